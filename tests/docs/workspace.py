"""A folder in which the pages' commands find what they name, at a size that trains in seconds."""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import torch
from docs.pages import ROOT
from surgery.gpt_oss_folders import random_gpt_oss, save_hugging_face, save_openai
from surgery.nanochat_folders import save_random
from texts import wikipedia
from tiny import TINY_SHAPE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 512

TINY_MODEL = TINY_SHAPE | {"model.widths": "[8,16,32]", "model.mamba_d_state": "8"}
TINY_EXPERTS = {"model.num_experts": "4", "model.experts_per_token": "2", "model.expert_ffn_size": "32"}
TINY_RUN = {
    "train.steps": "3",
    "train.seq_len": "32",
    "train.micro_batch_size": "2",
    "train.global_batch_size": "16",
    "train.eval_tokens": "300",
    "optimizer.warmup_steps": "1",
    "checkpoint.interval": "2",
}
SMALLER = [
    # 8 ranks become 2
    (r"(--num_gpus|--nproc-per-node|--parallel\.ep) 8\b", r"\1 2"),
    # nanochat's d32 is one of 32 layers and 32 channels here
    (r"--widths 128,512,1024,2048", "--widths 8,16,32"),
    (r"--hidden 2560", "--hidden 48"),
    (r"extract (\S+) (\S+) --width 512", r"extract \1 \2 --width 16"),
    (r"--minutes 10", "--minutes 0.2"),
    (r'--pattern "\(TM\)x32"', r"\g<0> --mamba-head-dim 8"),
    (r"--mamba-num-heads 256 --mamba-num-groups 8", "--mamba-num-heads 16 --mamba-num-groups 2 --mamba-head-dim 8"),
    (r"--max-tokens 20000", "--max-tokens 300"),
    (r"--tokens 65536", "--tokens 500"),
    (r"^adamba evaluate (?!.*(--max-tokens|--items)).*$", r"\g<0> --max-tokens 300"),
    # all of the library is 11 MB
    (r"--input python-stdlib", "--input ./python-stdlib"),
]
"""what is another size in the workspace: (pattern, in its place)"""


def small(line: str) -> str:
    """The command with sizes of the workspace."""
    for pattern, place in SMALLER:
        line = re.sub(pattern, place, line)
    trains = re.search(r"(adamba train|pretrain_adamba\.py) ", line)
    if not trains or re.search(r"--input|--print_config|--summary", line):
        return line
    settings = dict(TINY_RUN)
    if "--checkpoint.init_from" not in line and "runs/adaptive" not in line:
        settings |= TINY_MODEL | (TINY_EXPERTS if "gpt-oss" in line else {})
    return line + "".join(f" --{name} {value}" for name, value in settings.items())


def programs(place: Path) -> dict[str, str]:
    """An environment in which `adamba`, `deepspeed`, `torchrun` and `python` are this interpreter's."""
    place.mkdir()
    adamba = place / "adamba"
    adamba.write_text(f'#!/bin/sh\nexec {sys.executable} -m megatron_adamba "$@"\n')
    adamba.chmod(0o755)
    path = os.pathsep.join([str(place), sysconfig.get_path("scripts"), os.environ["PATH"]])
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def fill(place: Path) -> Path:
    """Texts, the repository's scripts, and checkpoints as others publish them."""
    book = wikipedia(400_000)
    (place / "book.txt").write_text(book[:60_000])
    (place / "texts").mkdir()
    for number in range(4):
        (place / "texts" / f"{number}.txt").write_text(book[number * 100_000 : (number + 1) * 100_000])
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
    (place / "python-stdlib").mkdir()
    for path in modules:
        shutil.copy(path, place / "python-stdlib")
    for name in ("pretrain_adamba.py", "examples"):
        (place / name).symlink_to(ROOT / name)
    return place


def add_published(place: Path) -> None:
    """nanochat-d32 and gpt-oss-20b, tiny, each with a tokenizer of its own."""
    for name, end in (("nanochat-d32", "<|bos|>"), ("gpt-oss-20b", "<|endoftext|>")):
        (place / name).mkdir()
        write_tokenizer(place / "texts", end, place / name / "tokenizer.json")
    save_random(place / "nanochat-d32", num_hidden_layers=32, vocab_size=VOCAB)
    model = random_gpt_oss("square experts, one key head", vocab_size=VOCAB, num_hidden_layers=24, num_local_experts=4)
    save_hugging_face(model, place / "gpt-oss-20b", torch.bfloat16)
    save_openai(model, place / "gpt-oss-20b" / "original", torch.bfloat16)


def write_tokenizer(texts: Path, end: str, path: Path) -> None:
    """Pairs of bytes merged by the library, as both publishers' tokenizers are made."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[end], initial_alphabet=alphabet)
    tokenizer.train([str(file) for file in sorted(texts.glob("*.txt"))], trainer)
    tokenizer.save(str(path))
