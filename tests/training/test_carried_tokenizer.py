"""A run's tokenizer travels with its checkpoints and its model: what becomes of the file since makes no difference."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest
from training.runs import arguments, losses, train

from megatron_adamba.checkpoint.offline import open_checkpoint, to_canonical, to_training
from megatron_adamba.checkpoint.training import verify_files
from megatron_adamba.config.cli import parse_arguments
from megatron_adamba.data.preprocess import PreprocessOptions, preprocess
from megatron_adamba.data.tokenizer import load_tokenizer
from megatron_adamba.errors import TokenizerError
from megatron_adamba.inference.load import load_model
from megatron_adamba.training.run_tokenizer import run_tokenizer


def ranks(folder: Path, words: tuple[bytes, ...] = (b"th", b"the", b"at")) -> Path:
    pieces = [bytes([value]) for value in range(256)] + list(words)
    path = folder / "mine.tiktoken"
    path.write_text("".join(f"{base64.b64encode(piece).decode()} {rank}\n" for rank, piece in enumerate(pieces)))
    return path


def plain_folder(folder: Path) -> Path:
    """A tokenizer.json of bytes whose end of document has no usual name."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<|halt|>"])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_overwriting_the_files_ends_nothing(tmp_path: Path):
    """One run on ranks that need a pattern, gone on with after the file was overwritten; then everything it left."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number}.txt").write_text("the quick model reads nested layers at night 2024 " * 8)
    spec, chosen = f"tiktoken:{ranks(tmp_path)}", {"split_pattern": "gpt2"}
    preprocess(PreprocessOptions((str(texts),), str(tmp_path / "data" / "train"), spec, **chosen))
    options = {"data__tokenizer": spec, "data__split_pattern": "gpt2", "data__validation": "[]"}
    options |= {"train__steps": 2, "checkpoint__interval": 1}
    run = tmp_path / "run"
    train(1, arguments(tmp_path / "data", run, **options))
    original = load_tokenizer(spec, **chosen)
    ranks(tmp_path, (b"qu",))
    step = run / "checkpoints" / "step-00000001"
    verify_files(step)
    assert all(name in json.loads((step / "files.json").read_text()) for name in original.carried())
    for folder in (run / "model", step):
        copy = shutil.copytree(folder, tmp_path / "elsewhere" / folder.name)
        assert load_tokenizer(str(copy)).hash == original.hash
    assert load_model(tmp_path / "elsewhere" / "model", "fp32").tokenizer.encode("2024") == original.encode("2024")
    words = arguments(tmp_path / "data", tmp_path / "b", **options)
    again = train(1, [*words, "--resume", str(tmp_path / "elsewhere" / step.name)])
    assert losses(tmp_path / "b")[2] == losses(run)[2] and "goes on with its own" in again.stdout
    to_canonical(open_checkpoint(step), tmp_path / "converted")
    to_training(open_checkpoint(tmp_path / "converted"), tmp_path / "start", 1, 1)
    for name in ("converted", "start"):
        assert load_tokenizer(str(tmp_path / name)).hash == original.hash
    verify_files(tmp_path / "start")


def test_a_folder_and_an_unusual_end_of_document_reach_the_run(tmp_path: Path):
    """And a file that another tokenizer was put in is not taken where the run names that one."""
    tok = plain_folder(tmp_path / "tok")
    flags = ["--data.tokenizer", str(tok), "--data.eod_token", "<|halt|>", "--resume", str(tmp_path / "step")]
    config = parse_arguments(["--preset", "tiny-hybrid", *flags]).config
    tokenizer, note = run_tokenizer(config, True)
    assert (tokenizer.eod_id, note) == (256, "")
    (tmp_path / "step").mkdir()
    for name, content in tokenizer.carried().items():
        (tmp_path / "step" / name).write_bytes(content)
    (tmp_path / "step" / "state.json").write_text(json.dumps({"config": config.to_dict()}))
    shutil.rmtree(tok)
    kept, note = run_tokenizer(config, True)
    assert kept.hash == tokenizer.hash and kept.eod_id == 256 and "cannot be read any more" in note
    config.data.tokenizer = "bytes"
    config.data.eod_token = None
    assert run_tokenizer(config, True)[0].name == "bytes"
    config.data.tokenizer = str(tmp_path / "other.model")
    with pytest.raises(TokenizerError, match=r"--data\.tokenizer .*no such file"):
        run_tokenizer(config, True)
