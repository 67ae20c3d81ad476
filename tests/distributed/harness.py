"""Process groups shared by the tests of a session."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PATIENCE = 5.0
"""seconds that ranks may still take once one has failed"""


class WorkerGroup:
    """`size` ranks on gloo; `run` calls a function of a module in this folder on all of them at once."""

    def __init__(self, size: int, log: Path) -> None:
        self.log = log
        self._log_file = open(log, "w")  # noqa: SIM115 - lives as long as the group
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.ranks = []
        for rank in range(size):
            env = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
            }
            command = [sys.executable, str(HERE / "worker.py")]
            pipe = subprocess.PIPE
            self.ranks.append(
                subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._log_file, env=env, text=True, cwd=ROOT)
            )

    def run(self, module: str, function: str, **arguments: Any) -> list[Any]:
        """Results by rank. Raises RuntimeError with the first failing rank's traceback; where others then wait for it
        in a collective, the group is given up."""
        self._signal(signal.SIGCONT)
        try:
            return self._run(module, function, arguments)
        finally:
            # gloo's threads wake a hundred times a second each, with nothing to do too
            self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        for process in self.ranks:
            process.send_signal(number)

    def _run(self, module: str, function: str, arguments: dict[str, Any]) -> list[Any]:
        request = json.dumps({"module": module, "function": function, "arguments": arguments}) + "\n"
        for process in self.ranks:
            process.stdin.write(request)
            process.stdin.flush()
        answers: dict[int, dict[str, Any]] = {}
        failed: list[int] = []
        while len(answers) < len(self.ranks):
            waiting = {process.stdout: rank for rank, process in enumerate(self.ranks) if rank not in answers}
            ready, _, _ = select.select(list(waiting), [], [], PATIENCE if failed else None)
            if not ready:
                self.close()
                break
            for pipe in ready:
                line = pipe.readline()
                if not line:
                    self.close()
                    raise RuntimeError(f"rank {waiting[pipe]} died\n{self.log.read_text()[-4000:]}")
                answers[waiting[pipe]] = json.loads(line)
                if "error" in answers[waiting[pipe]]:
                    failed.append(waiting[pipe])
        if failed:
            answer = answers[failed[0]]
            raise RuntimeError(f"rank {failed[0]}: {answer['error']}\n{answer['trace']}")
        return [answers[rank]["result"] for rank in range(len(self.ranks))]

    def close(self) -> None:
        for process in self.ranks:
            process.kill()
            process.wait()
        self._log_file.close()


class WorkerPool:
    """Groups by size, started when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.groups: dict[int, WorkerGroup] = {}

    def __call__(self, size: int) -> WorkerGroup:
        group = self.groups.get(size)
        if group is None or any(process.poll() is not None for process in group.ranks):
            group = self.groups[size] = WorkerGroup(size, self.folder / f"workers-{size}.log")
        return group

    def close(self) -> None:
        for group in self.groups.values():
            group.close()
