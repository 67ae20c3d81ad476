"""Text tasks of graded difficulty with their answers: `copy trqz>trqz`, `add 37 45>82`, `rev trqz>zqrt`.

python examples/difficulty/tasks.py --output runs/difficulty/data

Writes train.jsonl, {"text"} a line, and {tuning,heldout}-{easy,medium,hard}.jsonl, {"prompt", "answer"} a line: what
thresholds are chosen on, and what is reported. The hash of its prompt says where an item belongs, so no prompt is on
two sides, however many are drawn.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_adamba.config.script import run_script
from megatron_adamba.files import write_atomically

PROMPT_END = ">"
SIDES = ("tuning", "heldout", "heldout")
"""of one prompt in ten, by thirds; nobody trains on them"""

Task = Callable[[random.Random], tuple[str, str]]


def copy(rng: random.Random) -> tuple[str, str]:
    word = _word(rng, 2, 5)
    return f"copy {word}", word


def count(rng: random.Random) -> tuple[str, str]:
    letters = rng.sample(string.ascii_lowercase, 3)
    word = "".join(rng.choice(letters) for _ in range(rng.randint(3, 6)))
    return f"count {letters[0]} {word}", str(word.count(letters[0]))


def add(rng: random.Random) -> tuple[str, str]:
    first, second = rng.randint(0, 99), rng.randint(0, 29)
    return f"add {first} {second}", str(first + second)


def length(rng: random.Random) -> tuple[str, str]:
    word = _word(rng, 2, 7)
    return f"len {word}", str(len(word))


def multi_step_sum(rng: random.Random) -> tuple[str, str]:
    numbers = [rng.randint(0, 99) for _ in range(3)]
    return "sum " + " ".join(map(str, numbers)), str(sum(numbers))


def reverse(rng: random.Random) -> tuple[str, str]:
    word = _word(rng, 5, 8)
    return f"rev {word}", word[::-1]


def digit_sum(rng: random.Random) -> tuple[str, str]:
    digits = "".join(rng.choice(string.digits) for _ in range(rng.randint(5, 8)))
    return f"digits {digits}", str(sum(map(int, digits)))


TIERS: dict[str, tuple[Task, ...]] = {
    "easy": (copy,),
    "medium": (count, add, length),
    "hard": (multi_step_sum, reverse, digit_sum),
}

TRAINING_SHARES = {"easy": 1, "medium": 2, "hard": 3}
"""what is hard takes more practice"""


def _word(rng: random.Random, shortest: int, longest: int) -> str:
    return "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(shortest, longest)))


def items(tier: str, side: str, seed: int) -> Iterator[tuple[str, str]]:
    """Endless (prompt, answer) of a tier on one side, its tasks in turn; the prompt ends with PROMPT_END."""
    rng = random.Random(f"{seed} {tier} {side}")
    while True:
        for task in TIERS[tier]:
            while True:
                prompt, answer = task(rng)
                if side_of(prompt) == side:
                    break
            yield prompt + PROMPT_END, answer


def side_of(prompt: str) -> str:
    """train | tuning | heldout"""
    share, rest = divmod(zlib.crc32(prompt.encode()), 10)
    return "train" if rest else SIDES[share % len(SIDES)]


def _distinct(tier: str, side: str, seed: int, count: int) -> list[tuple[str, str]]:
    found: dict[str, str] = {}
    for prompt, answer in items(tier, side, seed):
        found[prompt] = answer
        if len(found) == count:
            return list(found.items())
    raise AssertionError("items never end")


def write(output: Path, train: int, held_out: int, seed: int) -> None:
    """train: items of all tiers together; held_out: distinct items of each tier, and half as many to tune on."""
    output.mkdir(parents=True, exist_ok=True)
    streams = {tier: items(tier, "train", seed) for tier in TIERS}
    turn = [tier for tier, share in TRAINING_SHARES.items() for _ in range(share)]
    lines = []
    for number in range(train):
        prompt, answer = next(streams[turn[number % len(turn)]])
        lines.append(json.dumps({"text": prompt + answer}))
    write_atomically(output / "train.jsonl", ("\n".join(lines) + "\n").encode())
    for tier in TIERS:
        for side, count in (("heldout", held_out), ("tuning", held_out // 2)):
            pairs = _distinct(tier, side, seed, count)
            lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in pairs]
            write_atomically(output / f"{side}-{tier}.jsonl", ("\n".join(lines) + "\n").encode())


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the files")
    parser.add_argument("--train", type=int, default=1_200_000, help="training items")
    parser.add_argument("--held-out", type=int, default=1000, help="items of each tier")
    parser.add_argument("--seed", type=int, default=1234)
    args = parser.parse_args(words)
    write(args.output, args.train, args.held_out, args.seed)
    return 0


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
