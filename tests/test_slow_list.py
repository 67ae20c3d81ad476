"""The list of slow tests names tests that exist, and leaves a quick one of every file but those that it names whole."""

from __future__ import annotations

import re
from pathlib import Path

from slow_list import slow_names

TESTS = Path(__file__).parent


def test_every_line_names_a_test():
    slow, quick = slow_names()
    for line in (*slow, *quick):
        file, _, rest = line.partition("::")
        text = (TESTS.parent / file).read_text()
        name = rest.partition("[")[0]
        assert re.search(rf"^def {re.escape(name)}", text, re.MULTILINE) or not rest, line
    for line in quick:
        assert line.startswith(slow), f"{line}: is not in the list anyway"
