"""The quickstart's recipe, scaled to a text's size and to the time there is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import yaml

MOST_EPOCHS = 40
"""a text that was read more often is learned by heart"""
FEWEST_STEPS = 40
_SHORTEST_FOR_PIECES = 50_000
"""bytes of text under which bytes are the tokens"""
_SMALL = 60_000
"""tokens under which a smaller model is trained"""
_SMALL_MODEL = {
    "hidden_size": 128,
    "head_dim": 32,
    "ffn_size": 512,
    "ffn_granule": 16,
    "mamba_head_dim": 32,
    "widths": [16, 32, 64, 128],
}


@dataclass(frozen=True)
class Recipe:
    """Settings of a run with the reason for each section: {section: (reason, {key: value})}."""

    sections: dict[str, tuple[str, dict[str, Any]]]
    tokens: int

    @property
    def tokens_per_step(self) -> int:
        train = self.sections["train"][1]
        return train["global_batch_size"] * train["seq_len"]

    def with_steps(self, seconds: float, left: float, minutes: float) -> Recipe:
        """As many steps as fit into the seconds that are left, but no more than the text can bear."""
        in_time = int(max(left, 0) / seconds)
        bearable = MOST_EPOCHS * self.tokens // self.tokens_per_step
        steps = max(min(in_time, bearable), FEWEST_STEPS)
        epochs = steps * self.tokens_per_step / self.tokens
        why = f"{steps} steps of {seconds:.2f} s fit into {minutes:g} minutes; they read the text {epochs:.1f} times"
        if steps == FEWEST_STEPS:
            why = f"{steps} steps, the fewest that teach anything; a step takes {seconds:.2f} s"
        elif bearable < in_time:
            why = f"{steps} steps read the text {epochs:.0f} times; a text read more often is learned by heart"
        settings = {"steps": steps, "eval_interval": max(steps // 4, 1)}
        return (
            self._with("train", why, settings)
            ._with("optimizer", "short warm-up", {"warmup_steps": min(20, max(steps // 10, 1))})
            ._with("checkpoint", "four times on the way", {"interval": max(steps // 4, 1)})
            ._with("logging", "some hundred lines", {"interval": max(steps // 100, 1)})
        )

    def _with(self, section: str, why: str, values: dict[str, Any]) -> Recipe:
        before_why, before = self.sections.get(section, ("", {}))
        reasons = "; ".join(part for part in (before_why, why) if part)
        return replace(self, sections={**self.sections, section: (reasons, {**before, **values})})

    def lines(self) -> list[str]:
        """What was chosen and why, for start-up."""
        found = []
        for section, (why, values) in self.sections.items():
            if section in ("model", "train"):
                shown = ", ".join(f"{key} {value}" for key, value in values.items())
                found.append(f"{section:10} {shown}  ({why})")
        return found

    def as_yaml(self) -> str:
        parts = []
        for section, (why, values) in self.sections.items():
            parts.append(f"# {why}\n" + yaml.safe_dump({section: values}, sort_keys=False, allow_unicode=True))
        return "".join(parts)


def vocab_size_for(num_bytes: int) -> int | None:
    """A power of two from 512 to 4,096, one piece for 256 bytes of text; None where bytes serve better."""
    if num_bytes < _SHORTEST_FOR_PIECES:
        return None
    return min(max(1 << (num_bytes // 256).bit_length() - 1, 512), 4096)


def recipe_for(tokens: int, data: str, tokenizer: str, scaled: bool) -> Recipe:
    """tokens: of the training side; data: folder of the dataset; scaled: the model and batch too, where no preset says
    them."""
    sections: dict[str, tuple[str, dict[str, Any]]] = {
        "data": (
            "made from the texts",
            {"train": [f"{data}/train"], "validation": [f"{data}/validation"], "tokenizer": tokenizer},
        ),
        "checkpoint": ("the same command goes on where the run stopped", {"resume": "auto"}),
    }
    longest = 1 << max((tokens // 16).bit_length() - 1, 3)
    seq_len = min(256 if tokens < 5_000_000 else 512, longest)
    batch = {"seq_len": seq_len, "micro_batch_size": 8, "global_batch_size": 8, "eval_tokens": 16384}
    if scaled:
        sections["train"] = (f"windows of {seq_len} tokens suit a text of {tokens:,}", batch)
        if tokens < _SMALL:
            sections["model"] = (f"a small one, as the text has {tokens:,} tokens", dict(_SMALL_MODEL))
    return Recipe(sections, tokens)
