"""tools/evaluate.py --adaptive: every figure against passes over one document at a time."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from commands.test_small_tools import TEXTS, dataset  # noqa: F401
from surgery.test_gates_carried import gated_source

from megatron_adamba.blueprint.flops import forward_flops
from megatron_adamba.elastic.plan import uniform_plan
from megatron_adamba.inference.adaptive import run_adaptively
from megatron_adamba.inference.adaptive_evaluation import PolicyRow, over_widths
from megatron_adamba.inference.compute import ComputeMeter
from megatron_adamba.inference.gate_quality import extra_loss, gate_quality
from megatron_adamba.inference.items import Item, evaluate_grid, evaluate_mode, read_items
from megatron_adamba.inference.load import load_model
from megatron_adamba.inference.modes import Mode

PNG = b"\x89PNG\r\n\x1a\n"
PAIRS = [("copy ab>", "ab"), ("a", "häuser"), ("some longer words>", "x"), ("sum 1 2>", "3")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return gated_source(tmp_path_factory.mktemp("run") / "model", "mixed", "TMEMETTT")


def items_file(folder):
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in PAIRS))
    return path


def one_by_one(loaded, item: Item, mode: Mode):
    """Losses of the answer, FLOPs, exits and whether it is right, without a batch."""
    policy = mode.policy(loaded, item.prompt)
    tokens = torch.tensor([item.inputs])
    if policy.adaptive is None:
        logits = loaded.model(tokens, plan=policy.plan)[0]
        exits = [policy.plan.exit_layer] * len(item.inputs)
        widened = [8] * len(item.inputs)
    else:
        x, trace = run_adaptively(loaded.model, loaded.gates, loaded.reading, tokens, [policy.plan], policy.adaptive)
        logits = loaded.model.logits(x)[0]
        exits, widened = trace.exit_layers[0].tolist(), trace.widened_at[0].tolist()
    scored = logits[item.first :]
    losses = torch.nn.functional.cross_entropy(scored, torch.tensor(item.answer), reduction="none")
    flops = ComputeMeter(loaded.model.config, policy, len(item.inputs), mode.asks_estimator(loaded)).total(
        exits, widened
    )
    return losses, flops, exits[item.first :], scored.argmax(-1).tolist() == list(item.answer)


@pytest.mark.parametrize(
    "mode",
    [
        Mode("full"),
        Mode(width=16, exit_layer=3),
        Mode("adaptive", None, {"exit_threshold": 0.4}),
        Mode("adaptive", None, {"exit_threshold": 0.4}, energy_price=2.0),
        Mode("adaptive", None, {"exit_threshold": 0.6, "expand_cost": 0.1}, predict=False),
    ],
    ids=str,
)
def test_items_in_batches_are_items_alone(checkpoint, tmp_path, mode):
    loaded = load_model(checkpoint, "fp32")
    items = read_items(items_file(tmp_path), loaded.tokenizer)
    for item, result in zip(items, evaluate_mode(loaded, items, mode, batch_size=3), strict=True):
        losses, flops, exits, right = one_by_one(loaded, item, mode)
        assert torch.allclose(torch.tensor(result.losses), losses, atol=1e-4)
        assert (result.flops, list(result.answer_exits), result.right) == (flops, exits, right)
        full = forward_flops(loaded.model.config, (32,) * 8, len(item.inputs))
        assert result.full_flops == full * len(item.inputs)


def test_right_means_that_greedy_decoding_gives_the_answer(checkpoint):
    """Items whose answers the model itself made."""
    from megatron_adamba.inference.generate import Generation, GenerationRequest

    loaded, items = load_model(checkpoint, "fp32"), []
    mode = Mode("adaptive", None, {"exit_threshold": 0.4})
    for prompt in ("ab", "xyz", "0"):
        ids = (256, *loaded.tokenizer.encode(prompt))
        generation = Generation(loaded, 1, 50)
        made = [generation.add(GenerationRequest(ids, mode.policy(loaded, ids), 6, stop_at_eod=False))[1].token]
        while generation.running:
            made += [new.token for new in generation.step()]
        items += [Item(ids, tuple(made)), Item(ids, (*made[:-1], (made[-1] + 1) % 257))]
    assert [result.right for result in evaluate_mode(loaded, items, mode)] == [True, False] * 3


def test_the_grid_is_every_fixed_pair(checkpoint, tmp_path):
    loaded = load_model(checkpoint, "fp32")
    items = read_items(items_file(tmp_path), loaded.tokenizer)
    # answers that the model gives somewhere, so that something is right
    plan = uniform_plan(loaded.model.config, 16, 5)
    first = int(loaded.model(torch.tensor([items[0].prompt]), plan=plan)[0, -1].argmax())
    items.append(Item(items[0].prompt, (first,)))
    cells = {(cell.width, cell.exit_layer): cell for cell in evaluate_grid(loaded, items, batch_size=2)}
    assert len(cells) == 3 * 8 and cells[16, 5].right[-1]
    for (width, layer), cell in cells.items():
        results = evaluate_mode(loaded, items, Mode(width=width, exit_layer=layer))
        assert cell.right == tuple(result.right for result in results)
        assert cell.flops == sum(result.flops for result in results)


@pytest.mark.parametrize("target", ["relative", "divergence"])
def test_gate_quality_by_loops(checkpoint, tmp_path, target):
    loaded = load_model(checkpoint, "fp32")
    loaded = replace(loaded, gate_config=replace(loaded.gate_config, target=target))
    items = read_items(items_file(tmp_path), loaded.tokenizer)
    first, depth = loaded.min_exit_layer, 8
    wanted: dict[int, list[float]] = {layer: [] for layer in range(first, depth)}
    guessed: dict[int, list[float]] = {layer: [] for layer in range(first, depth)}
    lost = []
    for item in items:
        tokens, answer = torch.tensor([item.inputs]), torch.tensor(item.answer)
        x = loaded.model.embedding(tokens)
        context = loaded.model.training_context(tokens, None)
        losses, costs, log_p = {}, {}, {}
        for index, block in enumerate(loaded.model.blocks):
            x = block(x, loaded.model.rows[index][32], context)
            logits = loaded.model.logits(x)[0, item.first :]
            log_p[index + 1] = torch.log_softmax(logits.double(), -1)
            losses[index + 1] = torch.nn.functional.cross_entropy(logits, answer, reduction="none").tolist()
            if first <= index + 1 < depth:
                raw = loaded.gates.leaving(index + 1, x[0, item.first :])
                costs[index + 1] = torch.nn.functional.softplus(raw).tolist()
        for place in range(len(answer)):
            for layer in range(first, depth):
                if target == "relative":
                    wanted[layer].append(max(0.0, losses[layer][place] - losses[depth][place]))
                else:
                    end = log_p[depth][place]
                    wanted[layer].append((end.exp() * (end - log_p[layer][place])).sum().item())
                guessed[layer].append(costs[layer][place])
            gone = [layer for layer in range(first, depth) if 1 - costs[layer][place] > 0.4]
            if gone:
                lost.append(losses[gone[0]][place] - losses[depth][place])
    count = sum(map(len, wanted.values()))
    error = sum((w - g) ** 2 for layer in wanted for w, g in zip(wanted[layer], guessed[layer])) / count
    means = {layer: sum(values) / len(values) for layer, values in wanted.items()}
    variance = sum((w - means[layer]) ** 2 for layer in wanted for w in wanted[layer]) / count
    found = gate_quality(loaded, items, threshold=0.4, batch_size=3)
    assert found.squared_error == pytest.approx(error, rel=1e-4) and found.variance == pytest.approx(variance, rel=1e-4)
    assert lost and found.extra_loss == pytest.approx(sum(lost) / len(lost), abs=1e-4)
    assert found.leaving == pytest.approx(len(lost) / sum(len(item.answer) for item in items))


def test_extra_loss_counts_tokens_that_left(checkpoint, tmp_path):
    loaded = load_model(checkpoint, "fp32")
    items = read_items(items_file(tmp_path), loaded.tokenizer)
    full = evaluate_mode(loaded, items, Mode("full"))
    adaptive = evaluate_mode(loaded, items, Mode("adaptive", None, {"exit_threshold": 0.4}))
    lost = [
        mine - theirs
        for one, whole in zip(adaptive, full)
        for mine, theirs, layer in zip(one.losses, whole.losses, one.answer_exits)
        if layer < 8
    ]
    assert lost and extra_loss(adaptive, full, 8) == pytest.approx(sum(lost) / len(lost))


def test_a_dataset(adamba, checkpoint, dataset, tmp_path):  # noqa: F811
    """What the estimator may read is not scored, under any policy."""
    words = ("--model", checkpoint, "--data", dataset, "--seq-len", 20, "--dtype", "fp32", "--adaptive")
    table, picture = tmp_path / "t.json", tmp_path / "p.png"
    more = ("--exit-threshold", 0.4, 0.9, "--energy-price", 0.5, 5, "--fixed-exits", 2)
    code, out, _err = adamba("evaluate", *words, *more, "--json", table, "--plot", picture)
    assert code == 0 and picture.read_bytes().startswith(PNG) and "44 scored tokens of 5 pieces" in out
    report = json.loads(table.read_text())
    rows, gaps = report["rows"], report["over_widths"]
    low, high = min(gaps.values()), max(gaps.values())
    assert f"in bits per byte: {low:+.4f} (" in out.replace("\n", " ") and f" to {high:+.4f} (" in out.replace(
        "\n", " "
    )
    kinds = [row["kind"] for row in rows]
    assert kinds == ["width"] * 3 + ["exit"] * 2 + ["adaptive"] * 4
    assert [row["name"] for row in rows[-2:]] == ["exit 0.4, price 5", "exit 0.9, price 5"]
    loaded, total, scored, num_bytes = load_model(checkpoint, "fp32"), 0.0, 0, 0
    for text in TEXTS:
        ids = [256, *text.encode(), 256]
        for start in range(0, len(ids) - 1, 20):
            piece = torch.tensor([ids[start : start + 21]])
            kept = max(1, min(64, piece.shape[1] // 2))
            logits = loaded.model(piece[:, :-1], plan=uniform_plan(loaded.model.config, 16))
            losses = torch.nn.functional.cross_entropy(logits[0], piece[0, 1:], reduction="none")
            total, scored = total + losses[kept - 1 :].sum().item(), scored + len(losses) - kept + 1
            parts = [loaded.tokenizer.decode(part).encode() for part in (piece[0, :kept], piece[0])]
            num_bytes += len(parts[1]) - len(parts[0])
    assert rows[1]["name"] == "width 16"
    assert rows[1]["nats_per_token"] == pytest.approx(total / scored, abs=1e-5)
    assert rows[1]["bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes, abs=1e-5)
    assert all(row["mean_exit"] < 8 for row in rows if "exit 0.4" in row["name"]) and rows[2]["saved"] == 0


def test_distance_from_the_curve_of_the_widths():
    """Between two widths, on a width, beside the ends, and in nats where there are no bytes; the curve in any order."""
    points = [("width", 30, 1.0), ("width", 10, 2.0), ("width", 14, 1.6), ("exit", 20, 9.0), ("adaptive", 22, 1.25)]
    points += [("adaptive", 14, 1.5), ("adaptive", 9, 1.0), ("adaptive", 31, 1.0), ("adaptive", 12, 1.9)]
    for bits in (True, False):
        rows = [
            PolicyRow(kind, str(place), 7.0 if bits else value, value if bits else None, 0, 0, flops, 0, 0, 0)
            for place, (kind, flops, value) in enumerate(points)
        ]
        found = over_widths(rows)
        assert found == pytest.approx({"4": 1.25 - 1.3, "5": 1.5 - 1.6, "8": 1.9 - 1.8})


def test_items_from_a_file(adamba, checkpoint, tmp_path):
    words = ("--model", checkpoint, "--items", items_file(tmp_path), "--dtype", "fp32")
    code, _, _ = adamba("evaluate", *words, "--adaptive", "--json", tmp_path / "t.json")
    assert code == 0
    row = json.loads((tmp_path / "t.json").read_text())["rows"][-1]
    assert row["bits_per_byte"] is None and 0 <= row["exact_match"] <= row["token_accuracy"] <= 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no items"),
        ("[1]\n", "line 1: damaged (Input should be an object)"),
        ('{"prompt": "a"}\n', "line 1: answer: damaged"),
        ("{", "--items"),
    ],
)
def test_bad_items_are_refused(adamba, checkpoint, tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    code, _, err = adamba("evaluate", "--model", checkpoint, "--items", tmp_path / "bad.jsonl", "--adaptive")
    assert code == 3 and message in err and err.count("\n") == 1


def test_items_need_adaptive(adamba, checkpoint, tmp_path):
    code, _, err = adamba("evaluate", "--model", checkpoint, "--items", items_file(tmp_path))
    assert code == 2 and "--items: is read with --adaptive alone" in err
