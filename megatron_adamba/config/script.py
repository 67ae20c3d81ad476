"""What every script does around its `main`: failures of the user's as one line and an exit code."""

from __future__ import annotations

import atexit
import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from megatron_adamba.errors import AdambaError, StorageError

INTERRUPTED = 130
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def run_script(main: Callable[[list[str]], int]) -> None:
    """Runs `main` on the command line's words and exits with what it returns.

    An `AdambaError` becomes `error: ...` on stderr and its class's exit code; a full disk or one that refuses to be
    written to counts as `StorageError`, Ctrl-C exits with 130. Anything else is a defect and keeps its traceback.
    """
    try:
        sys.exit(main(sys.argv[1:]))
    except AdambaError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror}; free space or choose a folder that can be written", StorageError.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)


def leave(code: int) -> NoReturn:
    """Ends a process of a distributed run with `code`, its output and its exit functions done.

    The interpreter is not taken apart: threads of the process group that DeepSpeed still holds may run into that and
    abort, and the launcher would see 134 in place of `code`.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _fail(message: str, code: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
