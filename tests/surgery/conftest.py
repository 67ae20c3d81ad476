"""What several tests of this folder run."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def surgery_tool(adamba) -> Callable[..., tuple[str, str]]:
    """surgery_tool(words..., code=0): stdout and stderr of `adamba surgery`, once its exit code is this one."""

    def start(*words: object, code: int = 0) -> tuple[str, str]:
        ended, out, err = adamba("surgery", *words)
        assert ended == code, err
        return out, err

    return start
