"""Initial weights: each tensor a pure function of (seed, canonical name), whatever the layout."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import torch
from torch import Tensor

from megatron_adamba.blueprint.manifest import ParamSpec
from megatron_adamba.errors import ConfigError

DT_MIN, DT_MAX = 1e-3, 1e-1
"""range of Mamba's initial time steps (arXiv 2312.00752, section 3.6)"""


def name_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator of its own for one tensor."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def initial_tensor(spec: ParamSpec, seed: int) -> Tensor:
    """The whole canonical tensor in fp32; each expert is drawn from a generator of its own."""
    if spec.unit == "expert":
        one = replace(spec, shape=spec.shape[1:], unit=None)
        return torch.stack([initial_tensor(replace(one, name=f"{spec.name}/{e}"), seed) for e in range(spec.shape[0])])
    generator = name_generator(seed, spec.name)
    shape = spec.shape
    if spec.init == "ones":
        return torch.ones(shape)
    if spec.init in ("plus_two", "minus_two"):
        return torch.full(shape, 2.0 if spec.init == "plus_two" else -2.0)
    if spec.init in ("zeros", "output"):
        # output projections start at zero: every block begins as the identity and depth costs no tuning
        return torch.zeros(shape)
    if spec.init == "embedding":
        return torch.randn(shape, generator=generator)
    if spec.init == "tied_embedding":
        # as a head it makes logits of about unit variance from a normed residual
        return torch.randn(shape, generator=generator).mul_(shape[1] ** -0.5)
    if spec.init == "head":
        return torch.randn(shape, generator=generator).mul_(0.001)
    if spec.init in ("linear", "conv"):
        bound = math.sqrt(3) / math.sqrt(shape[-1])
        return torch.rand(shape, generator=generator).mul_(2 * bound).sub_(bound)
    if spec.init == "a_log_uniform":
        return torch.rand(shape, generator=generator).mul_(15).add_(1).log_()
    if spec.init == "a_log_arange":
        return torch.arange(1, shape[1] + 1, dtype=torch.float32).log_().expand(shape).clone()
    if spec.init == "dt_bias":
        return _dt_bias(shape, generator)
    raise ConfigError(f"{spec.name}: unknown initialisation {spec.init!r}")


def _dt_bias(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """softplus^-1 of time steps drawn log-uniformly between DT_MIN and DT_MAX."""
    low, high = math.log(DT_MIN), math.log(DT_MAX)
    step = torch.rand(shape, generator=generator).mul_(high - low).add_(low).exp_()
    return step + torch.log(-torch.expm1(-step))
