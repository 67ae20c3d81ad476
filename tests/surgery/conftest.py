"""What several tests of this folder run."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from surgery.test_surgery_tool import load_script

from megatron_adamba.config.script import run_script


@pytest.fixture
def surgery_tool(monkeypatch, capsys) -> Callable[..., tuple[str, str]]:
    """surgery_tool(words..., code=0): stdout and stderr of tools/surgery.py, once its exit code is this one."""

    def start(*words: object, code: int = 0) -> tuple[str, str]:
        module = load_script()
        monkeypatch.setattr(sys, "argv", ["surgery.py", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            run_script(module.main)
        out, err = capsys.readouterr()
        assert ended.value.code == code, err
        return out, err

    return start
