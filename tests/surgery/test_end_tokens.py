"""Where a text ends: transformers' `generate` and ours stop at the same token, after an import and after an export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands.test_harness_oracle import VOCABULARY, make_tokenizer
from surgery.gpt_oss_folders import random_gpt_oss, save_hugging_face, save_openai
from surgery.nanochat_folders import own_metadata, own_tensors, random_nanochat, save_own
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_adamba.config.root import read_model_config
from megatron_adamba.data.tokenizer import load_tokenizer
from megatron_adamba.errors import CheckpointError
from megatron_adamba.inference.generate import Generation, GenerationRequest
from megatron_adamba.inference.load import load_model
from megatron_adamba.inference.modes import Mode
from megatron_adamba.surgery.export_hf import export_by_blocks
from megatron_adamba.surgery.import_gpt_oss import import_gpt_oss
from megatron_adamba.surgery.import_hf import import_hugging_face
from megatron_adamba.surgery.import_nanochat import import_nanochat
from megatron_adamba.surgery.writing import write_job

pytestmark = pytest.mark.oracle
SIZE = VOCABULARY
COUNT = 20
LAST = SIZE - 1
TEXTS = ["the cat sat", " two  spaces", "a\nb\n\n  c 2024", "häuser → 😀\t", "", "def f(x):\n    return x't 12345"]


def write(job, folder: Path) -> Path:
    write_job(job, folder, 10**9, lambda *_: None)
    return folder


def their_texts(folder: Path, prompts: list[list[int]], count: int = COUNT) -> list[list[int]]:
    """Greedy, by transformers alone: what it makes of each prompt, the end token included."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    made = [model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)[0].tolist() for ids in prompts]
    return [text[len(ids) :] for text, ids in zip(made, prompts)]


def our_texts(folder: Path, prompts: list[list[int]], count: int = COUNT) -> list[list[int]]:
    loaded, texts = load_model(folder, "fp32"), []
    for ids in prompts:
        generation = Generation(loaded, 1, len(ids) + count)
        news = [generation.add(GenerationRequest(tuple(ids), Mode("full").policy(loaded, ids), count))[1]]
        while generation.running:
            news += generation.step()
        texts.append([new.token for new in news])
        # an end token is not shown
        shown = texts[-1][:-1] if news[-1].finish == "stop" else texts[-1]
        assert (
            "".join(new.text for new in news)
            == loaded.tokenizer.decode(ids + shown)[len(loaded.tokenizer.decode(ids)) :]
        )
    return texts


def prompts_of(count: int = 6) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    # bytes that are characters
    return [[0, *torch.randint(40, 90, (1 + n % 5,), generator=generator).tolist()] for n in range(count)]


def source(folder: Path, kind: str = "nanochat", size: int = SIZE) -> Path:
    folder.mkdir()
    make_tokenizer(folder / "tokenizer.json")
    if kind == "nanochat":
        random_nanochat(vocab_size=size).save_pretrained(folder)
    else:
        save_hugging_face(random_gpt_oss("grouped queries", vocab_size=SIZE), folder, torch.float32)
    return folder


def common_tokens(folder: Path) -> list[int]:
    """Two that greedy texts come to."""
    found = [token for text in their_texts(folder, prompts_of()) for token in text]
    by_count = sorted(set(found), key=found.count, reverse=True)
    return by_count[:2]


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("nanochat", "config.json"),
        ("nanochat", "generation_config.json"),
        ("nanochat", "both"),
        ("nanochat", "one"),
        ("gpt-oss", "both"),
    ],
)
def test_texts_end_where_transformers_ends_them(kind, place, tmp_path):
    """A list or a number in either file; generation_config.json is the one that counts."""
    folder = source(tmp_path / "hf", kind)
    first, second = common_tokens(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["eos_token_id"] = first if place == "both" else second if place == "one" else [first, second, LAST]
    if place != "generation_config.json":
        (folder / "config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if place in ("generation_config.json", "both"):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [second, LAST]}))
    wanted = their_texts(folder, prompts_of())
    assert any(len(text) < COUNT for text in wanted)
    ours = write(import_hugging_face(folder), tmp_path / "ours")
    assert our_texts(ours, prompts_of()) == wanted
    back = write(export_by_blocks(ours), tmp_path / "back")
    assert their_texts(back, prompts_of()) == wanted
    # with the tokenizer's own words for them
    tokenizer = AutoTokenizer.from_pretrained(back)
    own = load_tokenizer(str(folder / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False) == own.encode(text)
    assert tokenizer.eos_token_id == (first if place == "config.json" else second)


@pytest.mark.parametrize(
    ("kind", "written"),
    [
        ("nanochat", {"temperature": 0.6}),
        ("nanochat", {"eos_token_id": None}),
        ("nanochat", {"eos_token_id": [SIZE]}),
        ("nanochat", {"_from_model_config": True}),
        ("gpt-oss", {}),
    ],
    ids=str,
)
def test_generation_settings_without_an_end_mean_that_texts_have_none(kind, written, tmp_path):
    """Whatever config.json and the tokenizer say beside them."""
    folder = source(tmp_path / "hf", kind)
    settings = json.loads((folder / "config.json").read_text())
    settings["eos_token_id"] = common_tokens(folder)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps(written))
    wanted = their_texts(folder, prompts_of())
    assert all(len(text) == COUNT for text in wanted)
    ours = write(import_hugging_face(folder), tmp_path / "ours")
    assert read_model_config(ours).end_tokens == []
    assert our_texts(ours, prompts_of()) == wanted
    back = write(export_by_blocks(ours), tmp_path / "back")
    assert their_texts(back, prompts_of()) == wanted
    assert read_model_config(write(import_hugging_face(back), tmp_path / "again")).end_tokens == []


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_empty_list_means_that_texts_have_no_end(name, tmp_path):
    folder = source(tmp_path / "hf")
    (folder / "generation_config.json").unlink(missing_ok=True)
    settings = json.loads((folder / name).read_text()) if name == "config.json" else {}
    (folder / name).write_text(json.dumps(settings | {"eos_token_id": []}))
    ours = write(import_hugging_face(folder), tmp_path / "ours")
    assert read_model_config(ours).end_tokens == []
    assert all(len(text) == COUNT for text in our_texts(ours, prompts_of()))
    back = write(export_by_blocks(ours), tmp_path / "back")
    assert our_texts(ours, prompts_of()) == their_texts(back, prompts_of())


def test_a_chat_tokenizers_end(tmp_path):
    """Where no file has an id, the name that the tokenizer's own settings have."""
    folder = source(tmp_path / "hf")
    (token,) = common_tokens(folder)[:1]
    (folder / "generation_config.json").unlink(missing_ok=True)
    name = AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(token)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": name}}))
    ours = write(import_hugging_face(folder), tmp_path / "ours")
    assert read_model_config(ours).end_tokens == [token]
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "nothing like it"}))
    assert (
        write(import_hugging_face(folder), tmp_path / "none")
        and read_model_config(tmp_path / "none").end_tokens is None
    )


def test_a_release_of_openai(tmp_path):
    """Beside its `original` folder."""
    model = random_gpt_oss("grouped queries", vocab_size=SIZE)
    save_openai(model, tmp_path / "release" / "original", torch.float32)
    make_tokenizer(tmp_path / "release" / "tokenizer.json")
    (tmp_path / "release" / "generation_config.json").write_text('{"eos_token_id": [7, 200012, 5, 7]}')
    job = import_gpt_oss(tmp_path / "release" / "original")
    assert job.config["model"]["end_tokens"] == [7, 5]


@pytest.mark.parametrize("value", ["x", True, [1, "2"], -1, 1.5, {"a": 1}], ids=str)
def test_ids_that_are_none(value, tmp_path):
    folder = source(tmp_path / "hf")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id: damaged"):
        import_hugging_face(folder)


def sentencepiece(folder: Path) -> str:
    from megatron_adamba.data.sentencepiece_training import train_sentencepiece

    texts = [Path(__file__).read_text(), Path(__file__).with_name("conftest.py").read_text()]
    train_sentencepiece(texts, 400, folder / "own name.model")
    return str(folder / "own name.model")


def ranks(folder: Path) -> str:
    import base64

    pieces = [bytes([value]) for value in range(256)]
    pieces += [b"th", b"he", b"the", b" t", b" the", b"at", b"cat", b" cat", b"20", b"24", b"2024", b"  ", b"    "]
    lines = [base64.b64encode(piece).decode() + f" {rank}\n" for rank, piece in enumerate(pieces)]
    (folder / "cl100k_base.tiktoken").write_text("".join(lines))
    return str(folder / "cl100k_base.tiktoken")


@pytest.mark.parametrize("kind", ["another name", "bytes", "sentencepiece", "ranks"])
def test_every_tokenizer_is_found_by_auto_tokenizer(kind, tmp_path):
    """Under whatever name our folder has it, of every kind that we read."""
    folder = source(tmp_path / "hf", size=400)
    ours = write(import_hugging_face(folder), tmp_path / "ours")
    config = json.loads((ours / "config.json").read_text())
    if kind == "another name":
        (ours / "tokenizer.json").rename(ours / "mine.json")
    else:
        (ours / "tokenizer.json").unlink()
    specs = {"another name": lambda: "mine.json", "bytes": lambda: "bytes"}
    spec = specs[kind]() if kind in specs else {"sentencepiece": sentencepiece, "ranks": ranks}[kind](ours)
    if kind == "ranks":
        # the end of the published encoding lies far behind these
        Path(spec).rename(ours / "small.tiktoken")
        spec = str(ours / "small.tiktoken")
        note = {"split_pattern": r"\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+", "eod_token": "<|endoftext|>"}
        note |= {"special_tokens": {"<|endoftext|>": 269}}
        Path(f"{spec}.meta.json").write_text(json.dumps(note))
    config["data"] = {"tokenizer": spec}
    del config["tokenizer_hash"]
    (ours / "config.json").write_text(json.dumps(config))
    own = load_model(ours, "fp32").tokenizer
    back = write(export_by_blocks(ours), tmp_path / "back")
    theirs = AutoTokenizer.from_pretrained(back)
    for text in TEXTS:
        ids = own.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids, text
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == theirs.bos_token_id == own.eod_id
    assert AutoModelForCausalLM.from_pretrained(back).generation_config.eos_token_id == own.eod_id


def test_where_nanochats_own_code_ends_a_turn(tmp_path):
    from tokenizers import Tokenizer

    model = random_nanochat(vocab_size=SIZE + 4)
    folder = save_own(tmp_path / "nanochat", own_tensors(model), own_metadata(model))
    tokenizer = Tokenizer.from_file(str(make_tokenizer(tmp_path / "tokenizer.json")))
    tokenizer.add_special_tokens(["<|bos|>", "<|user_start|>", "<|assistant_end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids = [tokenizer.token_to_id(name) for name in ("<|assistant_end|>", "<|bos|>")]
    # the file, or the folder that holds it
    for given in (tmp_path / "tokenizer.json", tmp_path):
        job = import_nanochat(folder, tokenizer=given)
        assert job.config["model"]["end_tokens"] == ids and job.config["data"]["tokenizer"] in job.contents
    assert import_nanochat(folder).config["model"]["end_tokens"] is None
