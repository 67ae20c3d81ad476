"""`adamba serve`, from a clone."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_adamba.commands.main import door

if __name__ == "__main__":
    door("serve")
