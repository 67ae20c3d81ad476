"""What every script does around its `main`: failures of the user's as one line and an exit code."""

from __future__ import annotations

import atexit
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TextIO

from megatron_adamba.errors import AdambaError, ConfigError, StorageError

INTERRUPTED, READER_GONE = 130, 141
"""as shells count: 128 and the signal's number"""
_RUN_FLAG = re.compile(
    r"(?<![\w-])(?<!adamba train )--"
    r"(?=(?:model|elastic|distill|gates|data|train|optimizer|parallel|checkpoint|logging)\.\w|depth\b)"
)
_FLAG = re.compile(r"(?<![\w-])(?<!adamba train )--([a-z][\w.-]*)")
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)
PATH_ERRORS = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO)


def as_settings(text: str) -> str:
    """A message in which what are flags of a run alone, `--model.hidden_size`, are settings, as files hold them."""
    return _RUN_FLAG.sub("", text)


def without_flags(text: str) -> str:
    """A message for those who have no command line: `top_p` for `--top-p`."""
    return _FLAG.sub(lambda found: found[1].replace("-", "_"), text)


def run_script(
    run: Callable[[], int],
    reworded: Callable[[str], str] = as_settings,
    leave: Callable[[int], NoReturn] = sys.exit,
) -> NoReturn:
    """Calls `run` and ends the process by `leave`, with the exit code that it returns. reworded: what messages go
    through, so that they name no flag that the command has not.

    An `AdambaError` becomes `error: ...` on stderr and its class's exit code; a full disk or one that refuses to be
    written to counts as `StorageError`, a path that cannot be what it has to be as `ConfigError`. Ctrl-C exits
    with 130, a reader of the output that goes away (`| head`) ends the script with 141 and without a word. Anything
    else is a defect and keeps its traceback.
    """
    _show_any_text()
    try:
        code = run()
        sys.stdout.flush()  # here, where a closed pipe is caught, and not at the interpreter's end
        leave(code)
    except AdambaError as error:
        _fail(reworded(str(error)), error.exit_code)
    except BrokenPipeError:
        _discard(sys.stdout)
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
    except Stopped as stopped:
        _fail(f"stopped by {stopped.signal.name}; nothing was replaced", 128 + stopped.signal)


class Stopped(BaseException):
    """A signal asks the process to end, and it does so by way of its `finally` blocks."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Within it the signals that end jobs raise `Stopped`, so that no temporary files and processes stay behind.

    The first of them does; what comes while that is cleared away is ignored, and so is what was ignored before, as
    under nohup."""

    def stop(number: int, _: object) -> None:
        for known in before:
            signal.signal(known, signal.SIG_IGN)
        raise Stopped(number)

    before = {number: signal.getsignal(number) for number in _ENDING}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def _fail(message: str, code: int) -> NoReturn:
    try:
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        _discard(sys.stderr)
    sys.exit(code)


def _discard(stream: TextIO) -> None:
    """What a stream still holds goes nowhere, so that its end is quiet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
