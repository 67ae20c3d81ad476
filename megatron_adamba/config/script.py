"""What every script does around its `main`: failures of the user's as one line and an exit code."""

from __future__ import annotations

import atexit
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TextIO

from megatron_adamba.errors import AdambaError, ConfigError, StorageError

INTERRUPTED, READER_GONE = 130, 141
_RUN_FLAG = re.compile(
    r"(?<![\w-])(?<!pretrain_adamba\.py )--"
    r"(?=(?:model|elastic|gates|data|train|optimizer|parallel|checkpoint|logging)\.\w|depth\b)"
)
_FLAG = re.compile(r"(?<![\w-])(?<!\.py )--([a-z][\w.-]*)")
PATH_ERRORS = (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def as_settings(text: str) -> str:
    """A message in which what are flags of a run alone, `--model.hidden_size`, are settings, as files hold them."""
    return _RUN_FLAG.sub("", text)


def without_flags(text: str) -> str:
    """A message for those who have no command line: `top_p` for `--top-p`."""
    return _FLAG.sub(lambda found: found[1].replace("-", "_"), text)


def run_script(main: Callable[[list[str]], int], reworded: Callable[[str], str] = as_settings) -> None:
    """Runs `main` on the command line's words and exits with what it returns. reworded: what messages go through, so
    that they name no flag that the script has not.

    An `AdambaError` becomes `error: ...` on stderr and its class's exit code; a full disk or one that refuses to be
    written to counts as `StorageError`, a path that leads nowhere as `ConfigError`, Ctrl-C exits with 130. A reader
    that went away (`| head`) ends it as it ends other programs. Anything else is a defect and keeps its traceback.
    """
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()  # here, where a closed pipe is caught, and not at the interpreter's end
        sys.exit(code)
    except AdambaError as error:
        _fail(reworded(str(error)), error.exit_code)
    except BrokenPipeError:
        _discard(sys.stdout)
        sys.exit(READER_GONE)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in PATH_ERRORS:
            _fail(f"{where}{error.strerror}; give another path", ConfigError.exit_code)
        if error.errno not in DISK_ERRORS:
            raise
        _fail(f"{where}{error.strerror}; free space or choose a folder that can be written", StorageError.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
    except Stopped as stopped:
        _fail(f"stopped by {stopped.signal.name}; nothing was replaced", 128 + stopped.signal)


class Stopped(BaseException):
    """A signal asks the process to end, and it does so by way of its `finally` blocks."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise `Stopped`, so that temporary files and other processes do not stay behind.

    The first of them does; what comes while that is cleared away is ignored, and so is what was ignored before, as
    under nohup."""

    def stop(number: int, _: object) -> None:
        for known in before:
            signal.signal(known, signal.SIG_IGN)
        raise Stopped(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(code: int) -> NoReturn:
    """Ends a process of a distributed run with `code`, its output and its exit functions done.

    The interpreter is not taken apart: threads of the process group that DeepSpeed still holds may run into that and
    abort, and the launcher would see 134 in place of `code`.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _fail(message: str, code: int) -> NoReturn:
    try:
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        _discard(sys.stderr)
    sys.exit(code)


def _discard(stream: TextIO) -> None:
    """What a stream still holds goes nowhere, so that its end is quiet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
