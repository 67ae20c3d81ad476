"""The project's scripts as processes of their own, forked off a server that has done their imports.

A small run takes one second, and importing torch, DeepSpeed and the compiler that DeepSpeed pulls in takes four. What
runs is the script itself, from its first line to its exit code, with an environment and outputs of its own. What is
the same in all of them is the seed of Python's hashes; ranks of `distributed.harness` and runs that are killed are
fresh processes.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


@functools.cache
def _processes():
    if Path("/dev/nvidiactl").exists():
        # CUDA does not survive a fork
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # a name that the server finds from the folder that it starts in; where it does not, imports take their time
    context.set_forkserver_preload(["tests.preloaded"])
    return context


class ForkedScript:
    """Like `subprocess.Popen` of the interpreter and a script, with both outputs kept as text."""

    def __init__(self, script: Path, words: Sequence[str], env: dict[str, str], cwd: Path = ROOT) -> None:
        self.args = [sys.executable, str(script), *words]
        with tempfile.NamedTemporaryFile(delete=False) as out, tempfile.NamedTemporaryFile(delete=False) as errors:
            self._outputs = Path(out.name), Path(errors.name)
        arguments = (str(script), list(words), env, str(cwd), *map(str, self._outputs))
        self._process = _processes().Process(target=_run, args=arguments)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Standard output and standard error, once it has ended."""
        self.wait(timeout)
        out, errors = (path.read_text() for path in self._outputs)
        return out, errors

    def kill(self) -> None:
        """No trace of it stays."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        for path in self._outputs:
            path.unlink(missing_ok=True)


def run_forked(
    script: Path, words: Sequence[object], env: dict[str, str] | None = None, cwd: Path = ROOT, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Like `subprocess.run` of the interpreter and a script."""
    process = ForkedScript(script, [str(word) for word in words], dict(os.environ if env is None else env), cwd)
    try:
        out, errors = process.communicate(timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, errors)
    finally:
        process.kill()


def _run(script: str, words: list[str], env: dict[str, str], cwd: str, out: str, errors: str) -> None:
    for path, number in ((out, 1), (errors, 2)):
        taken = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(taken, number)
        os.close(taken)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [script, *words]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
