"""Where values come from: defaults, presets, files, the depth dial and the command line, in layers."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_adamba.blueprint.manifest import manifest
from megatron_adamba.blueprint.nest import mode_width
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.blueprint.summary import summarize
from megatron_adamba.config.cli import ParsedArguments, parse_arguments, preset_names
from megatron_adamba.config.depth import REASONS, derive_from_depth
from megatron_adamba.config.model import NestRow
from megatron_adamba.config.root import AdambaConfig
from megatron_adamba.errors import ConfigError
from megatron_adamba.training.freeze import frozen_names


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


def test_nothing_given_is_the_defaults():
    parsed = parse_arguments([])
    assert parsed == ParsedArguments(config=AdambaConfig(), sources=parsed.sources)
    assert set(parsed.sources.values()) == {"default"}
    keys = {f"{name}.{key}" for name, section in AdambaConfig().to_dict().items() for key in section}
    assert set(parsed.sources) == keys
    assert (parsed.deepspeed_config, parsed.depth, parsed.derived) == (None, None, {})
    assert not parsed.print_config and not parsed.summary


def test_later_layers_win(tmp_path):
    path = write(tmp_path, "model: {hidden_size: 512, ffn_granule: 16}\ntrain: {steps: 9}\noptimizer:\n")
    words = ["--model.hidden_size", "768", "--preset", "tiny-hybrid", "--config", path]
    parsed = parse_arguments(words)
    expected = {
        "model.hidden_size": (768, "command line"),
        "model.ffn_granule": (16, path),
        "train.steps": (9, path),
        "optimizer.name": ("muon", "preset tiny-hybrid"),
        "elastic.sandwich_passes": (2, "preset tiny-hybrid"),
        "optimizer.beta1": (0.9, "default"),
        "model.mamba_d_conv": (4, "default"),
    }
    for key, (value, source) in expected.items():
        section, name = key.split(".")
        assert getattr(getattr(parsed.config, section), name) == value, key
        assert parsed.sources[key] == source, key


def test_of_several_files_the_later_wins(tmp_path):
    first = write(tmp_path, "model: {hidden_size: 96, head_dim: 32}\ntrain: {steps: 7}")
    second = tmp_path / "second.yaml"
    second.write_text("train: {steps: 9}")
    parsed = parse_arguments(["--config", first, "--config", str(second)])
    assert (parsed.config.model.hidden_size, parsed.config.train.steps) == (96, 9)
    assert parsed.sources["model.head_dim"] == first and parsed.sources["train.steps"] == str(second)
    assert parse_arguments(["--config", str(second), "--config", first]).config.train.steps == 7


def test_the_order_of_words_does_not_matter_but_a_repeated_flag_does():
    config = parse_arguments(["--train.steps=5", "--preset", "tiny-hybrid", "--train.steps", "7"]).config
    assert config.train.steps == 7


def test_every_flag_of_a_run(tmp_path):
    words = ["--deepspeed_config", "ds.json", "--local_rank=3", "--print_config", "--summary", "--resume", "auto"]
    parsed = parse_arguments(words)
    assert (parsed.deepspeed_config, parsed.print_config, parsed.summary) == ("ds.json", True, True)
    assert parsed.config.checkpoint.resume == "auto" and parsed.sources["checkpoint.resume"] == "command line"
    # launchers put it anywhere, and it changes nothing
    assert parse_arguments(["--local_rank", "1", "--train.steps", "3"]).config.train.steps == 3


def test_values_of_every_kind():
    words = [
        "--model.widths", "[64,256]", "--model.linear_bias", "true", "--model.num_layers", "null",
        "--model.block_pattern", "(TM)x2", "--optimizer.lr", "1e-4", "--data.train", "[0.3,a,0.7,b]",
        "--train.freeze", "[embedding,head]", "--model.modes", "{small: 32}",
        "--model.nest", "[{width: 256, norm_size: 200, kv_groups: 4, ffn: 1024}]",
    ]  # fmt: skip
    config = parse_arguments(words).config
    assert config.model.widths == [64, 256] and config.model.linear_bias is True and config.model.num_layers is None
    assert config.model.block_pattern == "(TM)x2" and config.optimizer.lr == 1e-4
    assert config.data.train == ["0.3", "a", "0.7", "b"] and config.train.freeze == ["embedding", "head"]
    assert config.model.modes == {"small": 32} and config.model.nest == [NestRow(256, 200, 4, 1024)]


def test_lists_need_no_brackets():
    words = ["--train.freeze", "embedding,head", "--model.widths=64,256", "--data.train", "0.3,a,0.7,b"]
    words += ["--data.validation", "held/out", "--parallel.stage_bounds", "null", "--model.layer_widths", "64"]
    config = parse_arguments(words).config
    assert config.train.freeze == ["embedding", "head"] and config.model.widths == [64, 256]
    assert config.data.train == ["0.3", "a", "0.7", "b"] and config.data.validation == ["held/out"]
    assert config.parallel.stage_bounds is None and config.model.layer_widths == [64]
    # one of several comma-separated things that are no list
    assert parse_arguments(["--model.block_pattern", "T,M"]).config.model.block_pattern == "T,M"


@pytest.mark.parametrize("pattern", ["[transformer, mamba]", "[T, M]", "TM", "'Tx1 M'"])
def test_a_file_may_give_the_pattern_as_a_list(tmp_path, pattern):
    parsed = parse_arguments(["--config", write(tmp_path, f"model: {{block_pattern: {pattern}}}")])
    assert resolve_model(parsed.config.model, 9).block_pattern == "TM"


def test_two_parses_share_nothing():
    first, second = parse_arguments([]).config, parse_arguments([]).config
    first.model.modes["x"] = 1
    first.train.freeze.append("mlp")
    assert second == AdambaConfig() == parse_arguments([]).config


def test_depth_derives_a_model():
    parsed = parse_arguments(["--depth", "20"])
    config = parsed.config
    assert (config.model.hidden_size, config.model.num_layers, config.model.num_heads) == (1280, 20, 10)
    assert config.train.global_batch_size * config.train.seq_len == 2**19
    assert config.optimizer.name == "muon"
    assert config.optimizer.lr == pytest.approx(0.004 * (1280 / 768) ** -0.5, abs=1e-6)
    assert parsed.depth == 20 and set(parsed.derived) == set(REASONS)
    assert {parsed.sources[key] for key in parsed.derived} == {"--depth 20"}
    model = resolve_model(config.model, 100)
    assert model.block_pattern == "T" * 20 and model.ffn_size == 5120


def test_depth_lies_right_under_its_own_layer(tmp_path):
    path = write(tmp_path, "depth: 8\nmodel: {hidden_size: 640}\noptimizer: {lr: 0.5}")
    parsed = parse_arguments(["--preset", "tiny-hybrid", "--config", path, "--model.head_dim", "32"])
    assert parsed.config.model.hidden_size == 640 and parsed.sources["model.hidden_size"] == path
    assert parsed.config.optimizer.lr == 0.5 and parsed.config.model.num_layers == 8
    assert parsed.config.model.head_dim == 32 and "model.head_dim" not in parsed.derived
    # the file's depth replaces what the preset below said, its pattern too
    assert parsed.config.model.block_pattern is None and parsed.config.train.seq_len == 2048
    assert parsed.config.optimizer.muon_momentum == 0.95


def test_depth_of_the_command_line_beats_a_preset_but_not_its_neighbours():
    parsed = parse_arguments(["--preset", "transformer-d20", "--depth", "6", "--train.seq_len", "128"])
    assert parsed.config.model.num_layers == 6 and parsed.config.model.hidden_size == 384
    assert parsed.config.train.seq_len == 128 and parsed.depth == 6
    assert parsed.config.model.vocab_size == 65536


@pytest.mark.parametrize("depth", [1, 2, 3, 12, 32])
def test_every_depth_resolves(depth):
    values = derive_from_depth(depth)
    tokens = values["train.global_batch_size"] * values["train.seq_len"]
    assert tokens <= 2**19 and tokens & (tokens - 1) == 0
    model = resolve_model(parse_arguments(["--depth", str(depth)]).config.model, 50)
    assert model.num_layers == depth and model.num_heads * model.head_dim >= model.hidden_size


def test_depth_must_be_positive():
    with pytest.raises(ConfigError, match=r"--depth 0: must be 1 or more"):
        derive_from_depth(0)


BLOCKS = {
    "transformer-d20": "T" * 20,
    "mamba-d20": "M" * 20,
    "hybrid-alternating-d20": "TM" * 10,
    "hybrid-early-t-late-m-d20": "T" * 12 + "M" * 8,
    "rtx3070-d16": "TM" * 8,
    "tiny-hybrid": "TM" * 3,
    "adamba-6b": "TM" * 32,
    "adamba-9b": "TM" * 32,
    "adamba-20b": "TM" * 32,
    "gpt-oss-20b": "E" * 24,
    "gpt-oss-120b": "E" * 36,
    "gpt-oss-20b-hybrid": "EEM" * 12,
    "gpt-oss-tiny": "E" * 4,
}
HIDDEN = {"rtx3070-d16": 1024, "tiny-hybrid": 256, "adamba-6b": 2048, "adamba-9b": 2560, "adamba-20b": 4096}
HIDDEN |= {"gpt-oss-20b": 2880, "gpt-oss-120b": 2880, "gpt-oss-20b-hybrid": 2880, "gpt-oss-tiny": 256}
PUBLISHED = {"gpt-oss-20b": 20_914_757_184, "gpt-oss-120b": 116_829_156_672, "gpt-oss-20b-hybrid": 22_694_422_848}


def test_these_are_the_presets():
    assert preset_names() == sorted(BLOCKS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_gpt_oss_has_the_published_number_of_parameters(name):
    """The first two as published; the hybrid is the 20B and what twelve Mamba-2 blocks of that shape add to it."""
    model = resolve_model(parse_arguments(["--preset", name]).config.model)
    assert summarize(model, 4096)["total_without_gains"] == PUBLISHED[name]


@pytest.mark.parametrize("name", BLOCKS)
def test_a_preset_loads_and_resolves(name):
    parsed = parse_arguments(["--preset", name])
    model = resolve_model(parsed.config.model, parsed.config.model.vocab_size or 4096)
    assert model.block_pattern == BLOCKS[name] and model.hidden_size == HIDDEN.get(name, 1280)
    assert model.widths[-1] == model.hidden_size and len(model.widths) >= 4
    assert resolve_model(model) == model
    summary = summarize(model, parsed.config.train.seq_len)
    assert summary["total"] == sum(spec.numel for spec in manifest(model)) == sum(summary["parameters"].values())
    assert summary["total_without_gains"] == summary["total"] - summary["parameters"]["gain"]
    flops = [row["forward_flops"] for row in summary["widths"]]
    assert flops == sorted(flops) and summary["widths"][-1]["share_of_full"] == 1
    if "M" not in model.block_pattern or "T" in model.block_pattern or model.mamba_use_mlp:
        assert flops[0] < flops[-1]


@pytest.mark.parametrize("name", ["adamba-6b", "adamba-9b", "adamba-20b"])
def test_the_summary_counts_what_a_formula_counts(name):
    model = resolve_model(parse_arguments(["--preset", name]).config.model)
    h, vocab, inner = model.hidden_size, 65536, 2 * model.hidden_size
    attention, mlp = 4 * h * h, 8 * h * h
    bc, heads = 2 * 8 * 128, inner // 64
    channels = inner + bc
    mixer = h * (inner + channels + heads) + 5 * channels + 3 * heads + inner + inner * h
    norms = 32 * (2 + 2) * h + h
    total = 2 * vocab * h + 32 * (attention + mlp) + 32 * (mixer + mlp) + norms
    assert summarize(model, 2048)["total_without_gains"] == total


def test_frozen_parts_cost_less_in_training():
    parsed = parse_arguments(["--preset", "tiny-hybrid", "--train.phase", "1", "--train.freeze", "gain"])
    model, train = resolve_model(parsed.config.model, 1000), parsed.config.train
    frozen = frozen_names(model, train)
    assert "embedding.weight" in frozen and "blocks.1.mixer_norm.gain" in frozen
    assert {name for name in frozen if ".mixer." in name} == set()
    rows, partly = summarize(model, 512)["widths"], summarize(model, 512, frozen)["widths"]
    for whole, part in zip(rows, partly):
        assert whole["training_flops"] == 3 * whole["forward_flops"] == 3 * part["forward_flops"]
        assert part["forward_flops"] < part["training_flops"] < whole["training_flops"]


def test_a_summary_refuses_groups_that_there_are_not():
    parsed = parse_arguments(["--preset", "tiny-hybrid", "--train.freeze", "atention"])
    with pytest.raises(ConfigError, match=r"--train.freeze.*attention"):
        frozen_names(resolve_model(parsed.config.model, 1000), parsed.config.train)


def test_modes_stand_for_widths():
    wide = resolve_model(parse_arguments(["--preset", "adamba-9b"]).config.model)
    assert [mode_width(wide, mode) for mode in ("ghost", "whisper", "normal", "think")] == [128, 512, 1024, 2560]
    tiny = resolve_model(parse_arguments(["--preset", "tiny-hybrid"]).config.model, 300)
    # of 256 channels an eighth of each: 16, 64, 128, to the nearest of 32, 64, 128, 256
    assert [mode_width(tiny, mode) for mode in ("ghost", "whisper", "normal", "think")] == [32, 64, 128, 256]
    with pytest.raises(ConfigError, match=r"mode loud: unknown; modes of this model are ghost, whisper, normal, think"):
        mode_width(tiny, "loud")
