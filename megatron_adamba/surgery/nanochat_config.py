"""The settings of nanochat checkpoints, its own metadata's and transformers', in the words of our config and back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_adamba.config.model import ModelConfig
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.errors import CheckpointError, ConfigError
from megatron_adamba.surgery.settings import Settings

NORM_EPS = 1.1920929e-7
"""of nanochat's own code: that of fp32, whatever it computes in"""
GRANULE = 64
ARCHITECTURE = "NanoChatForCausalLM"


@dataclass(frozen=True)
class CodeSettings:
    """What nanochat's code had as constants when it trained a model; no file says them. None: not given."""

    rope_base: float | None = None
    qk_scale: float | None = None
    softcap: float | None = None
    window: int | None = None
    """keys before a token's own that a layer S of the window pattern sees"""


class _Complete(CodeSettings):
    """With nothing left to be given."""

    rope_base: float
    qk_scale: float
    softcap: float


RELEASE = _Complete(rope_base=10000.0, qk_scale=1.0, softcap=15.0)
"""of the first release, October 2025"""


def read_metadata(path: Path, values: dict[str, Any], given: CodeSettings, newer: str | None) -> ModelConfig:
    """The model of a meta_NNNNNN.json.

    newer: a tensor that the first release did not have. Where there is one, or where the metadata has a key that it did
    not have, nothing that the files leave out is guessed.
    Raises CheckpointError naming a setting of the file, ConfigError naming a flag.
    """
    if values.get("model_config") is None:
        raise CheckpointError(f"{path}: has no model_config; give the folder of a nanochat checkpoint")
    s = Settings(values, str(path)).section("model_config")
    if s.take("window_pattern", None) is not None:
        newer = newer or "window_pattern"
    code = _complete(given, newer, path)
    layers, heads, hidden = s.layers("n_layer"), s.whole("n_head"), s.whole("n_embd")
    if heads and hidden % heads:
        raise s.refusal("n_embd", f"must be a multiple of n_head {heads}")
    pattern, window = _windows(s, layers, code.window)
    config = _model(
        layers,
        hidden_size=hidden,
        vocab_size=s.whole("vocab_size"),
        num_heads=heads,
        num_kv_groups=s.whole("n_kv_head", heads),
        head_dim=hidden // max(heads, 1),
        ffn_size=4 * hidden,
        norm_eps=NORM_EPS,
        rope_theta=code.rope_base,
        logit_softcap=code.softcap,
        rope_original_context=s.whole("sequence_len", 1024),
        window_pattern=pattern,
        sliding_window=window,
    )
    s.finish()
    return config


def _complete(given: CodeSettings, newer: str | None, path: Path) -> _Complete:
    """The release's settings where nothing else was given, if the checkpoint is one of its kind."""
    examples = {"rope_base": "10000", "qk_scale": "1", "softcap": "15"}
    missing = [name for name in examples if getattr(given, name) is None]
    flag = lambda name: "--" + name.replace("_", "-")
    if newer and missing:
        example = " ".join(f"{flag(name)} {examples[name]}" for name in missing)
        raise ConfigError(
            f"{', '.join(map(flag, missing))}: {newer} makes {path} newer than October 2025, and since then these "
            f"changed without a trace in the files; look them up in the code that trained it, for example {example}"
        )
    known = {name: value for name, value in vars(given).items() if value is not None}
    code = _Complete(**{**vars(RELEASE), **known})
    if not 0 < code.rope_base < math.inf:
        raise ConfigError(f"--rope-base {code.rope_base}: must be above 0 and finite, for example --rope-base 10000")
    if not 0 <= code.softcap < math.inf:
        raise ConfigError(f"--softcap {code.softcap}: must be 0 (none) or more and finite, for example --softcap 15")
    if code.qk_scale != 1:
        raise ConfigError(
            f"--qk-scale {code.qk_scale}: queries and keys of our models have no scale behind their norm; a model "
            f"trained with --qk-scale 1 can be imported"
        )
    return code


def _windows(s: Settings, layers: int, window: int | None) -> tuple[str, int | None]:
    """Pattern over the layers, of which the last sees everything whatever its letter, and our window's size."""
    rule = "must be letters S and L"
    letters = s.text("window_pattern", "L", rule)
    if not letters or set(letters.upper()) - {"S", "L"}:
        raise s.refusal("window_pattern", rule)
    pattern = (letters.upper() * layers)[: max(layers - 1, 0)] + "L"
    if "S" not in pattern:
        if window is not None:
            raise ConfigError(f"--window {window}: no layer of this model has a window; leave the flag out")
        return "L", None
    context = s.whole("sequence_len", 1024)
    if window is None:
        raise ConfigError(
            f"--window: no file says how far a layer S of window_pattern {letters} sees; its code had half the context "
            f"at first (--window {context // 2}), then a third and a quarter, both up to the next 128"
        )
    if window < 1:
        raise ConfigError(f"--window {window}: must be 1 or more, for example --window {context // 2}")
    # nanochat counts the keys before the token's own, we count that one too
    return pattern, window + 1


def to_metadata(config: ResolvedModel, step: int) -> dict[str, Any]:
    """meta_NNNNNN.json of the first release."""
    return {
        "step": step,
        "model_config": {
            "sequence_len": config.rope_original_context,
            "vocab_size": config.vocab_size,
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "n_kv_head": config.num_kv_groups,
            "n_embd": config.hidden_size,
        },
    }


def read_transformers_config(path: Path, values: dict[str, Any]) -> ModelConfig:
    """The model of a NanoChat config.json. Raises CheckpointError naming what our model cannot be."""
    s = Settings(values, str(path))
    s.must_be("model_type", "nanochat", "nanochat", "this reads NanoChat alone")
    s.must_be("architectures", [ARCHITECTURE], [ARCHITECTURE], "other heads have no place")
    s.must_be("hidden_act", "relu2", "relu2", "our MLP without gates has no other activation")
    s.must_be("attention_dropout", 0, 0, "our attention has none")
    s.must_be("attention_bias", False, False, "its MLPs have no biases, and ours have them together or not at all")
    s.must_be("is_encoder_decoder", False, False, "our models are decoders")
    s.must_be("quantization_config", None, None, "quantized weights are not read")
    heads, hidden = s.whole("num_attention_heads"), s.whole("hidden_size")
    config = _model(
        s.layers("num_hidden_layers"),
        hidden_size=hidden,
        vocab_size=s.whole("vocab_size"),
        num_heads=heads,
        num_kv_groups=s.whole("num_key_value_heads", heads),
        head_dim=s.whole("head_dim", hidden // max(heads, 1)),
        ffn_size=s.whole("intermediate_size"),
        norm_eps=s.number("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(s),
        rope_original_context=s.whole("max_position_embeddings", 2048),
        logit_softcap=_softcap(s),
        tie_embeddings=s.flag("tie_word_embeddings", False),
    )
    s.finish()
    return config


def _softcap(s: Settings) -> float:
    """null is a value of its own here: no softcap."""
    cap = s.number("final_logit_softcapping", 15.0)
    if s.values.get("final_logit_softcapping", 15.0) is None:
        return 0.0
    if cap == 0:
        raise s.refusal("final_logit_softcapping", "must be above 0; null turns it off")
    return cap


def _rope_theta(s: Settings) -> float:
    s.must_be("rope_scaling", None, None, "its frequencies are never scaled here")
    rope = s.section("rope_parameters", {})
    rope.must_be("rope_type", "default", "default", "behind its norm of queries and keys no scaled RoPE is ours")
    rope.must_be("partial_rotary_factor", 1, 1, "all channels of a head rotate")
    theta = rope.number("rope_theta", s.number("rope_theta", 10000.0))
    rope.finish()
    return theta


def to_transformers_config(config: ResolvedModel, dtype_name: str) -> dict[str, Any]:
    """config.json of transformers' NanoChatForCausalLM."""
    values = {
        "architectures": [ARCHITECTURE],
        "model_type": "nanochat",
        "dtype": dtype_name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_groups,
        "max_position_embeddings": config.rope_original_context,
        "hidden_act": "relu2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "final_logit_softcapping": config.logit_softcap or None,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if config.head_dim * config.num_heads != config.hidden_size:
        values["head_dim"] = config.head_dim
    return values


def _model(layers: int, **settings: Any) -> ModelConfig:
    """What all nanochat models share, and `settings`."""
    common: dict[str, Any] = {"activation": "relu2", "rope_sign": -1, "qk_norm": True}
    common |= {"embedding_norm": True, "norm_weight": False}
    # a width's MLP is cut in granules; one that divides its rows makes any size a model of ours
    granule = math.gcd(GRANULE, settings["ffn_size"]) or GRANULE
    return ModelConfig(block_pattern="T" * layers, ffn_granule=granule, **common, **settings)
