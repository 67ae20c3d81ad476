"""Fixtures for all tests."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import pytest

# on a GPU, Triton's float32 products would be TF32, and kernels differ from their references by 4e-3; read when one is
# compiled
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))


LONG_FILES = (
    "test_nanochat_road.py",
    "test_gpt_oss_examples.py",
    "test_benchmark.py",
    "test_resume.py",
    "test_killed_while_saving.py",
)
"""of few tests that take minutes; they come first, so that no process ends up waiting for another's"""


def pytest_collection_modifyitems(items):
    from slow_list import slow_names

    slow, quick = slow_names()
    for item in items:
        if item.nodeid.startswith(slow) and not item.nodeid.startswith(quick):
            item.add_marker(pytest.mark.slow)
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in LONG_FILES, -counts[item.path], item.path))


@pytest.fixture
def adamba(capsys):
    """adamba(words...): exit code, stdout and stderr of the command, run in this process."""
    from megatron_adamba.commands.main import main

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words], leave=sys.exit)
        return (ended.value.code or 0, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def workers(tmp_path_factory):
    """workers(n): n ranks on gloo that outlive single tests."""
    from distributed.harness import WorkerPool

    pool = WorkerPool(tmp_path_factory.mktemp("workers"))
    yield pool
    pool.close()


def pytest_sessionfinish(session, exitstatus):
    """An oracle that was not run proves nothing: in CI a skipped one fails the run."""
    if not os.environ.get("CI"):
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = [report.nodeid for report in reporter.stats.get("skipped", []) if "oracle" in report.keywords]
    if skipped:
        reporter.write_line(f"oracle tests skipped in CI: {', '.join(skipped)}", red=True)
        session.exitstatus = 1
