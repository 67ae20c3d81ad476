"""The whole product as calls from Python, in about a minute on two cores: python examples/python_api.py [FOLDER]

A tokenizer and a dataset from texts, a tiny elastic hybrid, its loss at every width, text at one of them, and a narrow
member of the family as a model of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import megatron_adamba as adamba

STEPS = 60


def main(folder: Path) -> None:
    texts = [f"The number {number} is {'even' if number % 2 == 0 else 'odd'}.\n" * 4 for number in range(400)]
    tokenizer = adamba.train_tokenizer(texts[:360], folder / "tokenizer.model", vocab_size=300)
    dataset = adamba.write_dataset(texts[:360], folder / "train", tokenizer)
    adamba.write_dataset(texts[360:], folder / "validation", tokenizer)
    print(f"{len(dataset)} documents, {dataset.num_tokens} tokens")

    config = adamba.make_config(
        settings={
            "model.hidden_size": 64,
            "model.block_pattern": "TMTM",
            "model.head_dim": 16,
            "model.ffn_granule": 16,
            "model.mamba_head_dim": 16,
            "model.widths": [16, 32, 64],
            "elastic.width_sampling": "sandwich",
            "data.train": [str(folder / "train")],
            "data.validation": [str(folder / "validation")],
            "data.tokenizer": str(folder / "tokenizer.model"),
            "train.steps": STEPS,
            "train.seq_len": 64,
            "optimizer.lr": 3e-3,
            "logging.run_dir": str(folder / "run"),
        }
    )
    seen: list[float] = []
    run = adamba.train(config, on_metrics=lambda record: seen.append(record["loss"]) if "loss" in record else None)
    print(f"loss {seen[0]:.3f} -> {seen[-1]:.3f}; model in {run.model}")

    model = adamba.load(run.model)
    for width, score in model.score("The number 7 is odd.\n").items():
        print(f"width {width:3}: {score.nats_per_token:.3f} nats per token, {score.bits_per_byte:.3f} bits per byte")
    for token in model.stream("The number 12 is", width=32, max_new_tokens=12, temperature=0):
        print(token.text, end="", flush=True)
    print()

    small = adamba.operations.extract(run.model, folder / "narrow", width=32)
    print(f"{small.folder}: {small.num_tensors} tensors; {small.promise}")
    same = adamba.operations.compare(run.model, small.folder, folder / "validation", width=32)
    print(f"logits differ by {same.max_logit_difference:.1e} over {same.tokens} tokens")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/python-api"))
