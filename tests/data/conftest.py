"""One tokenizer trained for the whole folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_helpers import INDENTED, TABBED

from megatron_adamba.data.sentencepiece_training import train_sentencepiece
from megatron_adamba.data.tokenizer_sentencepiece import SentencePieceTokenizer


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_sentencepiece([TABBED * 40, INDENTED * 40, "caf\u00e9 \u4f60\u597d " * 20], 400, path)
    return path


@pytest.fixture(scope="session")
def trained(model_path: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer.load(model_path)
