"""What the runs of this folder are trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
from training.runs import write_corpus


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))
