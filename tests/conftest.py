"""Fixtures for all tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# on a GPU, Triton's float32 products would be TF32, and kernels differ from their references by 4e-3; read when one is
# compiled
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))


LONGEST = ("surgery", "training", "distributed", "tools")
"""folders whose files take minutes; they come first, so that no process waits for the other's last one"""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(folder) if (folder := item.path.parent.name) in LONGEST else len(LONGEST))


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
