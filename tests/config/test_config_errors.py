"""What a command line or a file can get wrong: one line, the place, and what would work."""

from __future__ import annotations

import json
import os
import re

import pytest

from megatron_adamba.config.cli import parse_arguments, preset_names
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.config.root import model_config_from_dict, read_model_config
from megatron_adamba.config.rules import in_range, nearest, one_of, positive
from megatron_adamba.config.sections import OptimizerConfig
from megatron_adamba.errors import ConfigError


def message_of(words: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(words)
    text = str(caught.value)
    assert "\n" not in text and caught.value.exit_code == 2
    return text


FLAGS = [
    (["--model.hiden_size", "3"], "--model.hiden_size: unknown flag; did you mean --model.hidden_size?"),
    (["--modle.hidden_size=3"], "--modle.hidden_size: unknown flag; did you mean --model.hidden_size?"),
    (["--local-rank=1"], "--local-rank: unknown flag; did you mean --local_rank?"),
    (["--qqqqqqqqqqqq"], "--qqqqqqqqqqqq: unknown flag; see --help"),
    (["stray"], "command line: unrecognized arguments: stray"),
    (["--model.hidden_size"], "--model.hidden_size: expected one argument"),
    (["--model.hidden_size", "wide"], "--model.hidden_size: Expected a <class 'int'>. Got value: wide"),
    (["--model.hidden_size", "2.5"], "--model.hidden_size: Expected a <class 'int'>"),
    (["--model.widths", "[16,a]"], "--model.widths: Does not validate"),
    (["--model.nest", "[{width: 64}]"], "norm_size, kv_groups, ffn"),
    (["--model.linear_bias", "perhaps"], "--model.linear_bias"),
    (["--train.freeze", "{embedding: true}"], "--train.freeze: Expected a <class 'str'>"),
    (["--train.freeze", "--train.steps", "3"], "--train.freeze+: expected one argument"),
    (["--model.widths", "16,a"], "--model.widths: Does not validate"),
    (["--depth", "deep"], "--depth: Expected a <class 'int'>"),
    (["--depth", "0"], "--depth 0: must be 1 or more, for example --depth 12"),
    (["--preset", "adamba-6"], "--preset adamba-6: unknown; did you mean adamba-6b? (presets: adamba-20b, adamba-6b,"),
    (["--config", "/nowhere/run.yaml"], "--config /nowhere/run.yaml: No such file or directory; give a YAML file"),
    (["--train.steps", "0"], "--train.steps 0: must be above 0, for example --train.steps 1000"),
    (["--train.eval_interval", "-1"], "--train.eval_interval -1: must be at least 0, for example"),
    (["--train.gradient_clipping", "-1"], "--train.gradient_clipping -1.0: must be at least 0, for example"),
    (["--elastic.sandwich_passes", "1"], "--elastic.sandwich_passes 1: must lie between 2 and 64"),
    (["--elastic.plans_per_step", "0"], "--elastic.plans_per_step 0: must be above 0"),
    (["--elastic.width_sampling", "per-layer"], "full, uniform, per_layer, sandwich; for example --elastic.width_samp"),
    (["--gates.loss", "mse"], "--gates.loss mse: must be one of squared_error, deviance"),
    (["--gates.target", "sign"], "--gates.target sign: must be one of relative, signed, divergence, absolute"),
    (["--gates.loss", "deviance", "--gates.target", "absolute"], "is a share; try --gates.loss squared_error"),
    (["--optimizer.eps", "0"], "--optimizer.eps 0.0: must be above 0, for example --optimizer.eps 1e-08"),
    (["--optimizer.eps", ".inf"], "--optimizer.eps inf: must be above 0 and finite, for example"),
    (
        ["--optimizer.head_lr", "-1"],
        "--optimizer.head_lr -1.0: must be at least 0, for example --optimizer.head_lr 0.0",
    ),
    (["--optimizer.weight_decay", ".inf"], "--optimizer.weight_decay inf: must be at least 0 and finite, for example"),
    (["--train.gradient_clipping", ".nan"], "--train.gradient_clipping nan: must be at least 0 and finite"),
    (["--logging.run_dir", ""], "--logging.run_dir '': is empty; for example --logging.run_dir runs/default"),
    (["--resume", ""], "--resume '': is empty; give auto, never or the folder of a checkpoint"),
    (["--checkpoint.resume="], "--resume '': is empty; give auto"),
    (["--checkpoint.init_from", ""], "--checkpoint.init_from '': is empty; give the folder of a model"),
    (["--distill.share", "1.5"], "--distill.share 1.5: must lie between 0 and 1"),
    (["--distill.temperature", "0"], "--distill.temperature 0.0: must lie between 0.01 and 100"),
    (["--distill.divergence", "both"], "--distill.divergence both: must be one of forward, reverse"),
    (["--elastic.width_weights", "[1,-1]"], "--elastic.width_weights [1.0, -1.0]: must be 0 or more each"),
    (["--elastic.uniform_share", "2"], "--elastic.uniform_share 2.0: must lie between 0 and 1"),
    (["--checkpoint.keep_last", "0"], "--checkpoint.keep_last 0: must be above 0"),
    (["--checkpoint.interval", "-5"], "--checkpoint.interval -5: must be at least 0"),
    (["--logging.interval", "0"], "--logging.interval 0: must be above 0"),
    (["--parallel.tp", "0"], "--parallel.tp 0: must be above 0"),
    (
        ["--optimizer.name", "adam"],
        "--optimizer.name adam: must be one of adamw, muon; for example --optimizer.name ad",
    ),
    (["--optimizer.schedule", "linear"], "--optimizer.schedule linear: must be one of cosine, wsd, constant"),
    (["--optimizer.lr", "0"], "--optimizer.lr 0.0: must be above 0"),
    (["--optimizer.lr", "nan"], "--optimizer.lr: Expected a <class 'float'>"),
    (["--optimizer.beta2", "1.5"], "--optimizer.beta2 1.5: must lie between 0 and 1"),
    (
        ["--optimizer.warmup_steps", "-1"],
        "--optimizer.warmup_steps -1: must be at least 0, for example --optimizer.warmup_steps",
    ),
    (
        ["--model.activation", "swigl"],
        "--model.activation swigl: must be one of relu2, swiglu; for example --model.activ",
    ),
    (["--model.rope_sign", "2"], "--model.rope_sign 2: must be one of 1, -1"),
    (["--model.mamba_version", "3"], "--model.mamba_version 3: must be one of 1, 2"),
    (["--model.mamba_d_conv", "9"], "--model.mamba_d_conv 9: must be one of 2, 3, 4"),
    (["--model.window_pattern", "SX"], "--model.window_pattern X: must be one of S, L"),
    (["--model.window_pattern", ""], "--model.window_pattern '': is empty"),
    (["--model.hidden_size", "-8"], "--model.hidden_size -8: must be above 0"),
    (["--model.num_heads", "0"], "--model.num_heads 0: must be above 0"),
    (["--model.num_kv_groups", "-1"], "--model.num_kv_groups -1: must be above 0"),
    (["--model.mamba_num_heads", "0"], "--model.mamba_num_heads 0: must be above 0"),
    (["--model.vocab_size", "0"], "--model.vocab_size 0: must be above 0"),
    (["--model.static_norm_size", "-1"], "--model.static_norm_size -1: must be above 0"),
    (["--model.sliding_window", "0"], "--model.sliding_window 0: must be above 0"),
    (["--model.logit_softcap", "-15"], "--model.logit_softcap -15.0: must be at least 0"),
]


@pytest.mark.parametrize(("words", "message"), FLAGS, ids=[" ".join(words) or "-" for words, _ in FLAGS])
def test_a_command_line_that_cannot_be_used(words, message):
    assert message in message_of(words)


FILES = [
    ("model: {hiden_size: 3}", "unknown key model.hiden_size; did you mean model.hidden_size?"),
    ("modl: {hidden_size: 3}", "unknown section 'modl'; did you mean model?"),
    ("zzzzzz: 3", "unknown section 'zzzzzz'"),
    ("preset: tiny-hybrid", "unknown section 'preset'"),
    ("model: {hidden_size: wide}", "--model.hidden_size: Expected a <class 'int'>. Got value: wide"),
    ("depth: deep", "--depth: Expected a <class 'int'>"),
    ("model: 3", "section model holds 3; write `model:` and its keys below"),
    ("model: [hidden_size]", "section model holds ['hidden_size']"),
    ("a: [", "not YAML"),
    ("[1, 2]", "must hold sections such as `model:`"),
    ("", "must hold sections such as `model:`"),
    ("1: 2", "unknown section 1"),
    ("null: {steps: 2}", "unknown section None"),
    ("train: {1: 2}", "unknown key train.1"),
    ("train: {steps: 2}\ntrain: {seq_len: 64}", "train is given twice, in lines 1 and 2; write it once"),
    ("train:\n  steps: 2\n  seq_len: 64\n  steps: 3", "steps is given twice, in lines 2 and 4; write it once"),
    ("model: {modes: {ghost: 64, ghost: 32}}", "ghost is given twice, in lines 1 and 1; write it once"),
    ("train: {steps: -4}", "--train.steps -4: must be above 0"),
]


@pytest.mark.parametrize(("text", "message"), FILES, ids=[text or "-" for text, _ in FILES])
def test_a_file_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    got = message_of(["--config", str(path)])
    assert message in got and (str(path) in got or message.startswith("--train"))


def test_a_folder_is_not_a_config_file(tmp_path):
    assert "Is a directory" in message_of(["--config", str(tmp_path)])


def test_a_checkpoints_config_is_read_back(tmp_path):
    config = ModelConfig(num_layers=2, widths=[64, 256], vocab_size=9)
    (tmp_path / "config.json").write_text(json.dumps({"model": vars(config)}))
    assert read_model_config(tmp_path) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[]", "has no `model` section"),
        ('{"model": 3}', "has no `model` section"),
        (
            '{"model": {"hiddn": 3}}',
            "unknown model setting hiddn; this version knows activation, attention_sinks, block",
        ),
        ('{"model": {"hidden_size": "x"}}', "the model section is damaged"),
        ('{"model": {"nest": [{"width": 3}]}}', "the model section is damaged"),
        ('{"model": {"nest": 3}}', "the model section is damaged"),
        ('{"model": {"hidden_size": 0}}', "--model.hidden_size 0: must be above 0"),
    ],
)
def test_a_checkpoints_config_that_cannot_be_read_is_named(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        read_model_config(tmp_path)
    assert str(path) in str(caught.value) or message.startswith("--")


def test_unknown_settings_name_their_source():
    with pytest.raises(ConfigError, match=r"here: unknown model setting zz"):
        model_config_from_dict({"zz": 1}, "here")


def test_the_small_checks():
    for value in (0, -1, -0.5):
        with pytest.raises(ConfigError):
            positive("--x", value)
    in_range("--x", 0, 0, 1)
    in_range("--x", 1, 0, 1)
    with pytest.raises(ConfigError, match="--x nan"):
        in_range("--x", float("nan"), 0, 1)
    one_of("--x", 2, (1, 2))
    assert nearest("adamv", ["muon", "adamw"]) == "adamw" and nearest("zzz", ["muon"]) is None
    with pytest.raises(ConfigError, match=r"--optimizer.min_lr_ratio"):
        OptimizerConfig(min_lr_ratio=2).check()


def test_a_settings_file_that_is_no_text_or_no_file(tmp_path):
    path = tmp_path / "settings.yaml"
    for content in (b"\xff\xfe\x00", b"\x00" * 9, b"a: [" + b"[" * 5000, b"a: 2001-99-99"):
        path.write_bytes(content)
        assert f"--config {path}: " in message_of(["--config", str(path)])
    os.mkfifo(tmp_path / "pipe")
    assert "is no regular file" in message_of(["--config", str(tmp_path / "pipe")])


@pytest.mark.parametrize(
    "words",
    [
        ["--optimizer.beta2", "1"],
        ["--optimizer.beta1", "1.0"],
        ["--optimizer.weight_decay", "-0.1"],
        ["--optimizer.embedding_lr", "-1"],
        ["--optimizer.head_lr", "nan"],
        ["--optimizer.vector_lr", "inf"],
        ["--optimizer.lr", "nan"],
        ["--optimizer.lr", "inf"],
        ["--optimizer.muon_momentum", "1"],
        ["--train.seed", "-1"],
        ["--train.seed", "9223372036854775808"],
        ["--train.steps", "99999999999"],
        ["--train.gradient_clipping", "inf"],
        ["--model.vocab_size", "1099511627776"],
        ["--model.num_layers", "1000000000"],
        ["--model.num_heads", "1099511627776"],
        ["--model.norm_eps", "nan"],
        ["--gates.tau", "inf"],
    ],
)
def test_numbers_beyond_all_use_name_their_flag(words):
    assert words[0] in message_of([*words, *(["--model.num_layers", "2"] if words[0] != "--model.num_layers" else [])])


@pytest.mark.parametrize("name", preset_names())
def test_presets_save_now_and_then(name):
    assert parse_arguments(["--preset", name]).config.checkpoint.interval > 0


@pytest.mark.parametrize("place", ["file", "file/run", "/dev/null/x"])
@pytest.mark.parametrize("own", [False, True])
def test_a_run_folder_that_cannot_be(adamba, tmp_path, place, own):
    (tmp_path / "file").write_text("x")
    folder = place if place[0] == "/" else f"{tmp_path}/{place}"
    data = (
        ["--input", tmp_path / "file"] if own else ["--data.tokenizer", "bytes", "--data.train", tmp_path / "nothing"]
    )
    code, out, err = adamba("train", "--preset", "tiny-hybrid", *data, "--logging.run_dir", folder)
    blocked = "/dev/null" if place[0] == "/" else f"{tmp_path}/file"
    assert (code, out) == (2, "") and err.startswith(f"error: --logging.run_dir: {blocked} is no folder; for example")
    assert err.count("\n") == 1
