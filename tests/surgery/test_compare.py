"""`compare` against differences and losses that are computed here, document by document."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from surgery.nested_models import copied, load, lose_a_shard, made, refused, saved, source_model
from training.runs import write_corpus

from megatron_adamba.config.root import read_model_config
from megatron_adamba.data.blend import open_dataset
from megatron_adamba.data.packed import UNSCORED, evaluation_batches
from megatron_adamba.data.tokenizer import ByteTokenizer
from megatron_adamba.elastic.plan import ElasticPlan, full_plan, uniform_plan
from megatron_adamba.errors import ConfigError, TokenizerError
from megatron_adamba.inference.adaptive_evaluation import document_items
from megatron_adamba.surgery.compare import Comparison, comparable_plans, compare_models
from megatron_adamba.surgery.extract import extract


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def batches_of(data: Path, tokens: int | None = None, batch_size: int = 2, name: str = "validation"):
    indexed = open_dataset(str(data / name), ByteTokenizer(), "--data")
    return evaluation_batches(indexed, 64, batch_size, ByteTokenizer().eod_id, tokens)


def by_hand(first, second, plans, batches) -> Comparison:
    """Each batch whole, in the plainest way."""
    differences, losses, tokens = [], torch.zeros(2, dtype=torch.float64), 0
    for batch in batches:
        ids, labels = torch.from_numpy(batch["tokens"]), torch.from_numpy(batch["labels"])
        seq_idx = torch.from_numpy(batch["seq_idx"])
        a, b = (model(ids, seq_idx=seq_idx, plan=plan).double() for model, plan in zip((first, second), plans))
        scored = labels != -100
        differences.append((a - b).abs()[scored])
        for index, logits in enumerate((a, b)):
            losses[index] += F.cross_entropy(logits[scored], labels[scored], reduction="sum")
        tokens += int(scored.sum())
    all_of_them = torch.cat(differences)
    one, two = (losses / tokens).tolist()
    return Comparison(tokens, 257, all_of_them.max().item(), all_of_them.mean().item(), one, two)


def same(got: Comparison, want: Comparison) -> None:
    assert got.tokens == want.tokens and got.vocab_size == want.vocab_size
    for name in ("max_logit_difference", "mean_logit_difference", "first_loss", "second_loss"):
        assert math.isclose(getattr(got, name), getattr(want, name), rel_tol=1e-5), name


@pytest.mark.parametrize("width", [None, 8, 16])
def test_numbers(width, data, tmp_path):
    """Two models of different hidden sizes."""
    models = (source_model("mixed", 1), source_model("T", 2, hidden_size=48, num_heads=6, widths=[8, 16, 48]))
    folders = tuple(saved(model, tmp_path / name) for model, name in zip(models, "ab"))
    plans = comparable_plans(folders, width, None, None)
    chosen = [full_plan(m.config) if width is None else uniform_plan(m.config, width) for m in models]
    assert list(plans) == chosen
    want = by_hand(*models, plans, batches_of(data, 700))
    got = compare_models(models, plans, batches_of(data, 700), torch.device("cpu"))
    assert want.max_logit_difference > 1 and abs(want.first_loss - want.second_loss) > 0.01
    same(got, want)
    # windows and batches are no part of the result but for where documents are cut
    same(compare_models(models, plans, batches_of(data, 700, batch_size=5), torch.device("cpu")), want)


def test_the_largest_difference_is_found_wherever_it_is(data, tmp_path):
    """One logit of one token differs, and no more."""
    model, other = source_model("T"), source_model("T")
    other.head.weight[77] *= 1.5
    plans = (full_plan(model.config),) * 2
    got = compare_models((model, other), plans, batches_of(data, 500), torch.device("cpu"))
    same(got, by_hand(model, other, plans, batches_of(data, 500)))
    assert got.mean_logit_difference < got.max_logit_difference / 257
    back = compare_models((other, model), plans, batches_of(data, 500), torch.device("cpu"))
    assert (back.first_loss, back.loss_difference) == (got.second_loss, -got.loss_difference)


def test_what_is_no_number_is_not_hidden(data):
    model, broken = source_model("T"), source_model("T")
    broken.head.weight[3, 3] = float("nan")
    plans = (full_plan(model.config),) * 2
    for pair in ((model, broken), (broken, model)):
        got = compare_models(pair, plans, batches_of(data, 300), torch.device("cpu"))
        assert math.isnan(got.max_logit_difference) and math.isnan(got.mean_logit_difference)
        assert math.isnan(got.loss_difference) and math.isfinite(
            got.first_loss if pair[0] is model else got.second_loss
        )


def test_the_tool_on_an_extracted_model(surgery_tool, data, tmp_path):
    source = saved(source_model("mixed"), tmp_path / "a")
    part = made(extract(source, None, [16, 8, 16, 8], 4), tmp_path / "b")
    words = ("compare", source, part, "--data", data / "validation", data / "train", "--tokens", 5000, "--seq-len", 64)
    file = tmp_path / "new" / "numbers.json"
    out, err = surgery_tool(*words, "--widths", "16,8,16,8", "--exit-layer", 4, "--batch-size", 4, "--json", file)
    numbers = json.loads(file.read_text())
    assert numbers["max_logit_difference"] <= 1e-5 and abs(numbers["loss_difference"]) <= 1e-6
    assert numbers["first_plan"] == {"widths": [16, 8, 16, 8, 32], "exit_layer": 4}
    assert numbers["second_plan"] == {"widths": [16, 8, 16, 8], "exit_layer": 4}
    validation = batches_of(data)
    assert validation.num_tokens < numbers["tokens"] <= 5000 and numbers["vocab_size"] == 257
    lines = out.splitlines()
    assert lines[0].startswith("logits  differ by ") and f"over {numbers['tokens']:,} tokens" in lines[0]
    assert lines[1] == f"loss    {numbers['first_loss']:.6f} nats per token: {source} at width 8..32@4"
    assert lines[2] == f"loss    {numbers['second_loss']:.6f} nats per token: {part} at width 8..16"
    assert lines[3].endswith(" from the first to the second") and len(lines) == 4 and not err
    # all of the one against all of the other
    surgery_tool(*words, "--json", file)
    numbers = json.loads(file.read_text())
    assert numbers["first_plan"]["widths"] == [32] * 5 and numbers["second_plan"]["widths"] == [16, 8, 16, 8]
    got = Comparison(**{field.name: numbers[field.name] for field in fields(Comparison)})
    both = [*validation, *batches_of(data, 5000 - validation.num_tokens, name="train")]
    same(got, by_hand(load(source), load(part), (full_plan(load(source).config), ElasticPlan((16, 8, 16, 8), 4)), both))
    assert got.max_logit_difference > 1


def test_vocabularies_and_tokenizers_must_agree(tmp_path):
    a = saved(source_model("T"), tmp_path / "a")
    b = saved(source_model("T", vocab_size=300), tmp_path / "b")
    message = f"{b}: has a vocabulary of 300, {a} of 257; compare models of one vocabulary"
    refused(lambda: comparable_plans((a, b), None, None, None), message, kind=ConfigError)
    c = copied(a, tmp_path / "c")
    values = json.loads((c / "config.json").read_text())
    (c / "config.json").write_text(json.dumps(values | {"tokenizer_hash": "0" * 64}))
    message = f"{c}: was trained with another tokenizer than {a}"
    refused(lambda: comparable_plans((a, c), None, None, None), message, kind=TokenizerError)
    assert read_model_config(c) == read_model_config(a)


def test_errors_are_one_line(surgery_tool, data, tmp_path):
    a = saved(source_model("T"), tmp_path / "a")
    b = saved(source_model("T", widths=[16, 32]), tmp_path / "b")
    lost_from = copied(a, tmp_path / "c")
    lost = lose_a_shard(lost_from)
    text = data / "validation"
    for words, code, message in (
        ((a, b, "--data", text, "--width", 8), 2, f"--width 8: not in the nest of {b} ([16, 32]); try 16"),
        ((a, tmp_path / "no", "--data", text), 2, "no/config.json: cannot be read"),
        ((a, lost_from, "--data", text), 5, f"{lost}: missing"),
        ((a, a, "--data", tmp_path / "none"), 3, "none"),
        ((a, a, "--data", text, "--tokens", 0), 2, "--tokens 0: must be above 0, for example --tokens 1"),
        ((a, a, "--data", text, "--seq-len", -1), 2, "--seq-len -1: must be above 0"),
        ((a, a, "--data", text, "--widths", "8,x"), 2, "--widths 8,x: must be whole numbers"),
    ):
        out, err = surgery_tool("compare", *words, code=code)
        assert err.count("\n") == 1 and message in err and not out, err


@pytest.mark.parametrize("tokens", [1, 31, 64, 65, 1000])
def test_as_many_tokens_as_asked(data, tokens):
    """Whatever the documents: one of them may be longer than all that is asked for."""
    assert batches_of(data, tokens).num_tokens == tokens
    labels = np.concatenate([batch["labels"].flatten() for batch in batches_of(data, tokens)])
    assert np.count_nonzero(labels != UNSCORED) == tokens
    indexed = open_dataset(str(data / "validation"), ByteTokenizer(), "--data")
    items, num_bytes = document_items(indexed, ByteTokenizer(), 64, 1, tokens)
    assert sum(len(item.answer) for item in items) == tokens >= num_bytes > 0
