"""What every script does around its `main`: failures of the user's as one line and an exit code."""

from __future__ import annotations

import atexit
import errno
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from megatron_adamba.errors import AdambaError, ConfigError, StorageError

INTERRUPTED, READER_GONE = 130, 141
"""as shells count: 128 and the signal's number"""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)
PATH_ERRORS = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO)


def run_script(main: Callable[[list[str]], int]) -> None:
    """Runs `main` on the command line's words and exits with what it returns.

    An `AdambaError` becomes `error: ...` on stderr and its class's exit code; a full disk or one that refuses to be
    written to counts as `StorageError`, a path that cannot be what it has to be as `ConfigError`. Ctrl-C exits
    with 130, a reader of the output that goes away (`| head`) ends the script with 141 and without a word. Anything
    else is a defect and keeps its traceback.
    """
    _show_any_text()
    try:
        code = main(sys.argv[1:])
        # what is left in the buffer may be too much for a reader that has gone
        sys.stdout.flush()
        sys.exit(code)
    except AdambaError as error:
        _fail(str(error), error.exit_code)
    except BrokenPipeError:
        # the interpreter would flush once more, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(READER_GONE)
    except OSError as error:
        reason = error.strerror or str(error)
        path = error.filename2 or error.filename
        if error.errno in DISK_ERRORS:
            where = f"{path}: " if path else ""
            _fail(f"{where}{reason}; free space or choose a folder that can be written", StorageError.exit_code)
        if error.errno in PATH_ERRORS and path:
            _fail(f"{path}: {reason}; give another path", ConfigError.exit_code)
        raise
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)


def _show_any_text() -> None:
    """What a terminal cannot show, such as names that are not UTF-8, is spelled instead of ending the script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


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
