"""Jobs that hold our tensor-parallel linears and head against Megatron-core's own on the same ranks."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from unittest.mock import patch

import torch
from layer_jobs import Deviations, deviation, everyone, of_all_ranks, own_part, random
from torch import Tensor, nn

from megatron_adamba.blueprint.manifest import ParamSpec
from megatron_adamba.layers.linear import NestedLinears
from megatron_adamba.ops.nested_linear import Accumulation
from megatron_adamba.ops.vocab_parallel_cross_entropy import VocabularyShard, vocab_parallel_token_losses
from megatron_adamba.parallel.layout import cut, join
from megatron_adamba.parallel.tensor import TensorParallel

HIDDEN, ROWS, UNITS = 24, {"q": 40, "k": 20}, {"q": 10, "k": 5}
"""two maps of one input, dealt out by four units"""
BATCH, SEQ = 3, 8


@contextlib.contextmanager
def megatron(size: int) -> Iterator[None]:
    """Its groups over all ranks. Under sequence parallelism it puts buffers on the current CUDA device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    try:
        with patch("torch.cuda.current_device", lambda: torch.device("cpu")):
            yield
    finally:
        parallel_state.destroy_model_parallel()


def spec(length: int, unit: int, shape: tuple[int, ...], axis: int) -> ParamSpec:
    return ParamSpec("x", shape, "mlp", "matrix", "linear", "ffn_granule", axis, ((length, unit),))


def sequence_first(x: Tensor) -> Tensor:
    """[batch, seq, ...] to Megatron's [seq, batch, ...], and back."""
    return x.transpose(0, 1).contiguous()


def summed(tensor: Tensor) -> Tensor:
    """Under sequence parallelism Megatron leaves the sum of a replicated bias's gradient to its optimizer."""
    return torch.stack(of_all_ranks(tensor)).sum(0)


def linears(info, sp: bool) -> Deviations:
    """A job: column-parallel maps and the row-parallel one behind them, forward and all gradients, at full width."""
    tp = everyone(sp)
    weights = {name: random((rows, HIDDEN), rows, "float32") for name, rows in ROWS.items()}
    biases = {name: random((rows,), rows + 1, "float32") for name, rows in ROWS.items()}
    out_weight, out_bias = random((HIDDEN, ROWS["q"]), 3, "float32"), random((HIDDEN,), 4, "float32")
    x = random((BATCH, SEQ, HIDDEN), 5, "float32")
    cotangents = {name: random((BATCH, SEQ, rows), rows + 2, "float32") for name, rows in ROWS.items()}
    inner, out_cotangent = random((BATCH, SEQ, ROWS["q"]), 6, "float32"), random(x.shape, 7, "float32")
    with megatron(tp.size):
        theirs = _their_linears(tp, weights, biases, x, cotangents)
        theirs |= _their_row(tp, out_weight, out_bias, inner, out_cotangent)
    ours = _our_linears(tp, weights, biases, x, cotangents) | _our_row(tp, out_weight, out_bias, inner, out_cotangent)
    assert set(ours) == set(theirs)
    return {what: deviation(ours[what], theirs[what]) for what in theirs}


def _their_linears(tp, weights, biases, x, cotangents) -> dict[str, Tensor]:
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    config = ModelParallelConfig(
        tensor_model_parallel_size=tp.size,
        sequence_parallel=tp.sequence_parallel,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    mine, found, outputs, layers = sequence_first(own_part(x, tp)).requires_grad_(), {}, {}, {}
    for name, rows in ROWS.items():
        layer = ColumnParallelLinear(
            HIDDEN, rows, config=config, init_method=nn.init.zeros_, bias=True, gather_output=False
        )
        with torch.no_grad():
            layer.weight.copy_(weights[name].chunk(tp.size)[tp.rank])
            layer.bias.copy_(biases[name].chunk(tp.size)[tp.rank])
        layers[name], outputs[name] = layer, layer(mine)[0]
        found[f"{name} output"] = sequence_first(torch.cat(of_all_ranks(outputs[name]), dim=-1))
    shares = [sequence_first(cotangents[name].chunk(tp.size, dim=-1)[tp.rank]) for name in ROWS]
    torch.autograd.backward(list(outputs.values()), shares)
    for name, layer in layers.items():
        found[f"{name} weight"] = torch.cat(of_all_ranks(layer.weight.grad))
        found[f"{name} bias"] = torch.cat(of_all_ranks(layer.bias.grad))
    return found | {"column input": sequence_first(mine.grad)}


def _their_row(tp, weight, bias, inner, cotangent) -> dict[str, Tensor]:
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel.layers import RowParallelLinear

    config = ModelParallelConfig(
        tensor_model_parallel_size=tp.size,
        sequence_parallel=tp.sequence_parallel,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    layer = RowParallelLinear(
        ROWS["q"],
        HIDDEN,
        config=config,
        init_method=nn.init.zeros_,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=False,
    )
    with torch.no_grad():
        layer.weight.copy_(weight.chunk(tp.size, dim=1)[tp.rank])
        layer.bias.copy_(bias)
    mine = sequence_first(inner.chunk(tp.size, dim=-1)[tp.rank]).requires_grad_()
    y = layer(mine)[0]
    y.backward(sequence_first(own_part(cotangent, tp)))
    return {
        "row output": sequence_first(y.detach()),
        "row input": sequence_first(torch.cat(of_all_ranks(mine.grad), dim=-1)),
        "row weight": torch.cat(of_all_ranks(layer.weight.grad), dim=1),
        "row bias": summed(layer.bias.grad) if tp.sequence_parallel else layer.bias.grad,
    }


def _cut_channels(x: Tensor, unit: int, tp: TensorParallel) -> Tensor:
    return cut(spec(x.shape[-1], unit, tuple(x.shape), x.dim() - 1), x, tp.size, tp.rank)


def _join_channels(x: Tensor, channels: int, unit: int) -> Tensor:
    return join(spec(channels, unit, (*x.shape[:-1], channels), x.dim() - 1), of_all_ranks(x))


def _our_linears(tp: TensorParallel, weights, biases, x, cotangents) -> dict[str, Tensor]:
    by_row = {name: spec(rows, UNITS[name], (rows, HIDDEN), 0) for name, rows in ROWS.items()}
    by_entry = {name: spec(rows, UNITS[name], (rows,), 0) for name, rows in ROWS.items()}
    local = {name: cut(by_row[name], weights[name], tp.size, tp.rank) for name in ROWS}
    layer = NestedLinears({name: weight.shape[0] for name, weight in local.items()}, HIDDEN, bias=True)
    with torch.no_grad():
        for name in ROWS:
            layer.get_parameter(f"{name}_weight").copy_(local[name])
            layer.get_parameter(f"{name}_bias").copy_(cut(by_entry[name], biases[name], tp.size, tp.rank))
    mine = own_part(x, tp).clone().requires_grad_()
    outputs = layer(mine, [weight.shape[0] for weight in local.values()], Accumulation.DIRECT, tp.exchange)
    torch.autograd.backward(outputs, [_cut_channels(cotangents[name], UNITS[name], tp) for name in ROWS])
    found = {"column input": mine.grad}
    for name, y in zip(ROWS, outputs):
        found[f"{name} output"] = _join_channels(y, ROWS[name], UNITS[name])
        found[f"{name} weight"] = join(by_row[name], of_all_ranks(layer.get_parameter(f"{name}_weight").grad))
        found[f"{name} bias"] = join(by_entry[name], of_all_ranks(layer.get_parameter(f"{name}_bias").grad))
    return found


def _our_row(tp: TensorParallel, weight, bias, inner, cotangent) -> dict[str, Tensor]:
    by_column = spec(ROWS["q"], UNITS["q"], (HIDDEN, ROWS["q"]), 1)
    local = cut(by_column, weight, tp.size, tp.rank)
    layer = NestedLinears({"o": HIDDEN}, local.shape[1], bias=True)
    with torch.no_grad():
        layer.o_weight.copy_(local)
        layer.o_bias.copy_(bias)
    mine = _cut_channels(inner, UNITS["q"], tp).requires_grad_()
    (partial,) = layer(mine, (HIDDEN,), Accumulation.DIRECT, add_bias=tp.adds_bias)
    y = tp.reduce_output(partial)
    y.backward(own_part(cotangent, tp))
    return {
        "row output": y.detach(),
        "row input": _join_channels(mine.grad, ROWS["q"], UNITS["q"]),
        "row weight": join(by_column, of_all_ranks(layer.o_weight.grad)),
        "row bias": layer.o_bias.grad,
    }


def token_losses(info, vocab: int) -> float:
    """A job: the losses of tokens over a shared vocabulary, and the gradients of its logits."""
    tp = everyone(False)
    hidden, weight = random((BATCH, SEQ, HIDDEN), 1, "float32"), random((vocab, HIDDEN), 2, "float32")
    labels = torch.randint(0, vocab, (BATCH, SEQ), generator=torch.Generator().manual_seed(3))
    mine = weight.chunk(tp.size)[tp.rank]
    with megatron(tp.size):
        from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

        want = vocab_parallel_cross_entropy(sequence_first(hidden @ mine.T), sequence_first(labels))
    shard = VocabularyShard(vocab, tp.rank * mine.shape[0], tp)
    return deviation(vocab_parallel_token_losses(hidden, mine, labels, 0.0, shard), sequence_first(want))
