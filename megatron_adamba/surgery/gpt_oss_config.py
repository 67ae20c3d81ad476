"""The settings of GPT-OSS checkpoints, OpenAI's and transformers', in the words of our config and back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatron_adamba.config.model import ModelConfig
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.errors import CheckpointError
from megatron_adamba.surgery.settings import Settings

HUGGING_FACE, OPENAI = "Hugging Face", "OpenAI original"
NORM_EPS, GATE_SLOPE = 1e-5, 1.702
"""OpenAI's code has them as constants"""
GRANULE = 64
LETTERS = {"sliding_attention": "S", "full_attention": "L"}
_HARMLESS = ("max_position_embeddings", "output_router_logits", "router_aux_loss_coef")
"""its own settings that leave the logits alone"""
_ROPE_DEFAULT = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""what GptOssConfig takes where a file says nothing of RoPE"""


def read_gpt_oss_config(path: Path, values: dict[str, Any]) -> tuple[str, ModelConfig]:
    """Layout and model of a GPT-OSS config.json. Raises CheckpointError naming what our model cannot be."""
    if isinstance(values.get("model"), dict):
        raise CheckpointError(f"{path}: is a canonical checkpoint's already; there is nothing to import")
    settings = Settings(values, str(path))
    if "model_type" in values or "architectures" in values:
        return HUGGING_FACE, _from_hugging_face(settings)
    if "rope_ntk_alpha" in values:
        return OPENAI, _from_openai(settings)
    raise CheckpointError(f"{path}: is neither OpenAI's GPT-OSS config nor transformers' (no model_type)")


def _from_openai(s: Settings) -> ModelConfig:
    layers, window = s.layers("num_hidden_layers"), s.whole("sliding_window")
    rope = {
        "rope_theta": s.number("rope_theta"),
        "rope_factor": s.number("rope_scaling_factor"),
        "rope_original_context": s.whole("initial_context_length"),
        "rope_beta_fast": s.number("rope_ntk_beta"),
        "rope_beta_slow": s.number("rope_ntk_alpha"),
    }
    config = _model(
        layers,
        window_pattern=_shortest("SL" * layers, layers) if window else "L",
        sliding_window=window or None,
        hidden_size=s.whole("hidden_size"),
        vocab_size=s.whole("vocab_size"),
        num_heads=s.whole("num_attention_heads"),
        num_kv_groups=s.whole("num_key_value_heads"),
        head_dim=s.whole("head_dim"),
        num_experts=s.whole("num_experts"),
        experts_per_token=s.whole("experts_per_token"),
        expert_ffn_size=s.whole("intermediate_size"),
        expert_gate_limit=_gate_limit(s),
        **rope,
    )
    s.finish()
    return config


def _from_hugging_face(s: Settings) -> ModelConfig:
    s.must_be("model_type", "gpt_oss", "gpt_oss", "this reads GPT-OSS alone")
    s.must_be("architectures", ["GptOssForCausalLM"], ["GptOssForCausalLM"], "other heads have no place")
    s.must_be("hidden_act", "silu", "silu", "the experts' activation is a clamped SwiGLU")
    s.must_be("attention_dropout", 0, 0, "our attention has none")
    s.must_be("is_encoder_decoder", False, False, "our models are decoders")
    quantization = s.section("quantization_config", {})
    quantization.must_be("quant_method", "mxfp4", "mxfp4", "other kinds are not read")
    layers, heads = s.layers("num_hidden_layers"), s.whole("num_attention_heads")
    chosen = s.whole("num_experts_per_tok")
    experts = s.whole("num_experts" if "num_local_experts" not in s.values else "num_local_experts")
    s.must_agree("num_experts", experts, "num_local_experts")
    s.must_agree("experts_per_token", chosen, "num_experts_per_tok")
    pattern, window = _windows(s, layers)
    rope = _rope(s)
    s.must_agree("initial_context_length", rope["rope_original_context"], "original_max_position_embeddings")
    config = _model(
        layers,
        window_pattern=pattern,
        sliding_window=window,
        hidden_size=s.whole("hidden_size"),
        vocab_size=s.whole("vocab_size"),
        num_heads=heads,
        num_kv_groups=s.whole("num_key_value_heads", heads),
        head_dim=s.whole("head_dim", s.whole("hidden_size") // max(heads, 1)),
        linear_bias=s.flag("attention_bias", True),
        num_experts=experts,
        experts_per_token=chosen,
        expert_ffn_size=s.whole("intermediate_size"),
        expert_gate_limit=_gate_limit(s, 7.0),
        expert_gate_slope=s.number("swiglu_alpha", GATE_SLOPE),
        norm_eps=s.number("rms_norm_eps", NORM_EPS),
        tie_embeddings=s.flag("tie_word_embeddings", False),
        **rope,
    )
    s.finish(_HARMLESS)
    return config


def _model(layers: int, **settings: Any) -> ModelConfig:
    """What all GPT-OSS models share, and `settings`."""
    common = {"linear_bias": True, "qk_norm": False, "attention_sinks": True, "norm_eps": NORM_EPS}
    # a width's experts are cut in granules; one that divides their rows makes any size a model of ours
    granule = math.gcd(GRANULE, settings["expert_ffn_size"]) or GRANULE
    return ModelConfig(block_pattern="E" * layers, ffn_granule=granule, **{**common, **settings})


def _gate_limit(s: Settings, *default: float) -> float:
    limit = s.number("swiglu_limit", *default)
    if limit == 0:
        raise s.refusal("swiglu_limit", "must be above 0; here 0 would turn the clamp off")
    return limit


def _windows(s: Settings, layers: int) -> tuple[str, int | None]:
    """Pattern of S and L over the layers, and the window's size."""
    kinds = s.words("layer_types", [list(LETTERS)[index % 2] for index in range(layers)])
    if len(kinds) != layers:
        raise s.refusal("layer_types", f"must list {layers} layers")
    if strange := [kind for kind in kinds if kind not in LETTERS]:
        raise s.refusal("layer_types", f"{strange[0][:40]!r} is not one of {', '.join(LETTERS)}")
    pattern = _shortest("".join(LETTERS[kind] for kind in kinds), layers)
    window = s.whole("sliding_window", 128 if "sliding_window" not in s.values else None)
    if "S" in pattern and not window:
        raise s.refusal("sliding_window", "must be given for sliding_attention layers")
    return pattern, window or None


def _shortest(letters: str, layers: int) -> str:
    """The shortest pattern that, repeated, gives the letters of all layers."""
    letters = letters[:layers]
    repeated = lambda n: (letters[:n] * (layers // n + 1))[:layers]
    return next((letters[:n] for n in range(1, layers + 1) if repeated(n) == letters), "L")


def _rope(s: Settings) -> dict[str, Any]:
    given, legacy = s.take("rope_parameters", None), s.take("rope_scaling", None)
    if given is not None and legacy is not None and given != legacy:
        raise s.refusal("rope_scaling", "is not what rope_parameters says; take one of them out")
    rope = s.section("rope_scaling" if given is None else "rope_parameters", _ROPE_DEFAULT)
    theta = rope.number("rope_theta", s.number("rope_theta", 150000.0))
    kind = rope.take("rope_type", rope.take("type", "default"))
    rope.must_be("partial_rotary_factor", 1, 1, "all channels of a head rotate")
    if kind == "default":
        rope.finish(_ROPE_DEFAULT)
        return {"rope_theta": theta, "rope_factor": 1.0, "rope_original_context": 4096}
    if kind != "yarn":
        raise rope.refusal("rope_type", "must be yarn or default")
    factor = rope.number("factor")
    if factor < 1:
        raise rope.refusal("factor", "must be 1 or more")
    rope.must_be("truncate", False, True, "the correction range is never rounded to whole channels")
    for name in ("mscale", "mscale_all_dim"):
        rope.must_be(name, None, None, "the concentration follows from the factor")
    concentration = 0.1 * math.log(factor) + 1
    if not math.isclose(rope.number("attention_factor", concentration), concentration, rel_tol=1e-6):
        raise rope.refusal("attention_factor", f"must be 0.1 ln(factor) + 1 = {concentration:.6f}, or left out")
    found = {
        "rope_theta": theta,
        "rope_factor": factor,
        "rope_original_context": rope.whole("original_max_position_embeddings"),
        "rope_beta_fast": rope.number("beta_fast", 32.0),
        "rope_beta_slow": rope.number("beta_slow", 1.0),
    }
    rope.finish()
    return found


def to_hugging_face(config: ResolvedModel, dtype_name: str) -> dict[str, Any]:
    """config.json of transformers' GptOssForCausalLM for a model that `check_exportable` let through."""
    words = {letter: word for word, letter in LETTERS.items()}
    letters = (config.window_pattern * config.num_layers)[: config.num_layers]
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_factor > 1:
        rope = {
            "rope_type": "yarn",
            "factor": config.rope_factor,
            "beta_fast": config.rope_beta_fast,
            "beta_slow": config.rope_beta_slow,
            "truncate": False,
            "original_max_position_embeddings": config.rope_original_context,
        }
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "torch_dtype": dtype_name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.expert_ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_groups,
        "head_dim": config.head_dim,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "attention_bias": config.linear_bias,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "swiglu_alpha": config.expert_gate_slope,
        "swiglu_limit": config.expert_gate_limit,
        "rms_norm_eps": config.norm_eps,
        "layer_types": [words[letter] for letter in letters],
        # transformers makes the window's mask even where no layer wants it
        "sliding_window": config.sliding_window or 128,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "max_position_embeddings": int(config.rope_factor * config.rope_original_context),
        "tie_word_embeddings": config.tie_embeddings,
    }
