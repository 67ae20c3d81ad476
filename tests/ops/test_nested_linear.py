"""Nested linear maps against slices under autograd, and what their gradient buffers hold."""

from __future__ import annotations

import pytest
import torch
from op_helpers import NewTensors, leaves, near

from megatron_adamba.ops.nested_linear import Accumulation, GradientSink, nested_linears

ROWS, COLS = (13, 7), 11


def parameters(bias: bool, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, COLS, generator=generator).to(dtype).requires_grad_() for rows in ROWS]
    biases = [torch.randn(rows, generator=generator).to(dtype).requires_grad_() for rows in ROWS] if bias else None
    return weights, biases


def sinks(bias: bool) -> list[GradientSink]:
    return [GradientSink() for _ in range(4 if bias else 2)]


def sliced(x, weights, biases, rows, cols):
    """The same through plain slices in float64."""
    outputs = []
    for i, n in enumerate(rows):
        y = x @ weights[i][:n, :cols].T
        outputs.append(y if biases is None else y + biases[i][:n])
    return outputs


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "rows"),
    [((3, 5, 11), (13, 7)), ((3, 5, 4), (6, 7)), ((1, 1), (1, 1)), ((1, 9), (13, 2)), ((2, 3, 2, 11), (5, 5))],
)
@pytest.mark.parametrize("accumulation", [Accumulation.DIRECT, Accumulation.HAND_OVER])
def test_forward_and_gradients_are_those_of_slices(shape, rows, bias, accumulation):
    weights, biases = parameters(bias)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator).requires_grad_()
    cotangents = [torch.randn(*shape[:-1], n, generator=generator) for n in rows]
    got = nested_linears(x, weights, biases, rows, shape[-1], sinks(bias), accumulation)

    all_parameters = [*weights, *(biases or ())]
    x64, *doubles = leaves(x, *all_parameters)
    want = sliced(x64, doubles[:2], doubles[2:] or None, rows, shape[-1])
    for a, b in zip(got, want, strict=True):
        near(a, b)
    torch.autograd.backward(got, cotangents)
    torch.autograd.backward(want, [cotangent.double() for cotangent in cotangents])
    near(x.grad, x64.grad)
    for parameter, double in zip(all_parameters, doubles, strict=True):
        near(parameter.grad, double.grad)
    for i, n in enumerate(rows):
        assert not weights[i].grad[n:].any() and not weights[i].grad[:, shape[-1] :].any()
        assert biases is None or not biases[i].grad[n:].any()


@pytest.mark.parametrize("accumulation", [Accumulation.DIRECT, Accumulation.HAND_OVER])
@pytest.mark.parametrize("rows", [(13, 7), (4, 0)])
def test_zero_tokens_and_zero_rows_give_zero_gradients(accumulation, rows):
    weights, biases = parameters(True)
    x = torch.zeros(0, 5, 3, requires_grad=True)
    got = nested_linears(x, weights, biases, rows, 3, sinks(True), accumulation)
    assert [tuple(y.shape) for y in got] == [(0, 5, n) for n in rows]
    sum(y.sum() for y in got).backward()
    assert x.grad.shape == x.shape
    for parameter in [*weights, *biases]:
        assert parameter.grad.shape == parameter.shape and not parameter.grad.any()


@pytest.mark.parametrize("accumulation", [Accumulation.DIRECT, Accumulation.DEFER, Accumulation.HAND_OVER])
def test_an_input_without_gradient_still_trains_the_weights(accumulation):
    """The embedding may be frozen; the first layer trains all the same."""
    weights, biases = parameters(True)
    places = sinks(True)
    x = torch.randn(4, 6)
    y, z = nested_linears(x, weights, biases, (5, 7), 6, places, accumulation)
    (y.sum() + z.square().sum()).backward()
    if accumulation is Accumulation.DEFER:
        assert all(parameter.grad is None for parameter in [*weights, *biases])
        got = places[0].take(weights[0])
    else:
        got = weights[0].grad
    near(got[:5, :6], x.sum(0).expand(5, 6))
    assert not got[5:].any() and not got[:, 6:].any()


def test_frozen_weights_get_neither_gradient_nor_buffer():
    weights, biases = parameters(True)
    weights[0].requires_grad_(False)
    biases[1].requires_grad_(False)
    places = sinks(True)
    x = torch.randn(4, 6, requires_grad=True)
    got = nested_linears(x, weights, biases, (5, 7), 6, places, Accumulation.DEFER)
    sum(y.square().sum() for y in got).backward()
    assert x.grad.any()
    assert [sink.buffer is None for sink in places] == [True, False, False, True]
    got = nested_linears(x, weights, biases, (5, 7), 6, places, Accumulation.HAND_OVER)
    sum(y.square().sum() for y in got).backward()
    assert weights[0].grad is None and biases[1].grad is None
    assert weights[1].grad.any() and biases[0].grad.any()


def test_all_frozen_and_no_gradient_mode_need_no_graph():
    weights, biases = parameters(False)
    x, frozen = torch.randn(2, 6), [weight.detach() for weight in weights]
    outputs = nested_linears(x, frozen, biases, (5, 7), 6, sinks(False), Accumulation.DIRECT)
    with torch.no_grad():
        outputs += nested_linears(x, weights, biases, (5, 7), 6, sinks(False), Accumulation.DEFER)
    assert not any(y.requires_grad for y in outputs)


def test_an_unused_output_has_a_zero_gradient():
    weights, _ = parameters(False)
    first, _ = nested_linears(torch.randn(2, 6), weights, None, (5, 7), 6, sinks(False), Accumulation.DIRECT)
    first.sum().backward()
    assert weights[0].grad.any() and not weights[1].grad.any()


MICRO_BATCHES = [((13, 7), 11), ((2, 1), 3), ((6, 7), 8), ((2, 1), 3)]


def run_micro_batches(weights, biases, places, accumulations):
    for number, ((rows, cols), accumulation) in enumerate(zip(MICRO_BATCHES, accumulations, strict=True)):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(3, 2, cols, generator=generator).to(weights[0].dtype)
        outputs = nested_linears(x, weights, biases, rows, cols, places, accumulation)
        cotangents = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
        torch.autograd.backward(outputs, cotangents)


@pytest.mark.parametrize("bias", [False, True])
def test_deferring_and_handing_over_is_the_sum_of_handing_over_each_time(bias):
    """Twice in a row: the second step must start from zero."""
    weights, biases = parameters(bias)
    plain, plain_biases = parameters(bias)
    run_micro_batches(plain, plain_biases, sinks(bias), [Accumulation.DIRECT] * 4)
    places = sinks(bias)
    for _ in range(2):
        for parameter in [*weights, *(biases or ())]:
            parameter.grad = None
        run_micro_batches(weights, biases, places, [Accumulation.DEFER] * 3 + [Accumulation.HAND_OVER])
        for parameter, want in zip([*weights, *(biases or ())], [*plain, *(plain_biases or ())], strict=True):
            near(parameter.grad, want.grad)


def test_the_parameter_gets_one_gradient_a_step():
    """A data-parallel engine counts the calls of the hooks on a parameter."""
    weights, biases = parameters(True)
    calls = []
    for parameter in [*weights, *biases]:
        parameter.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    run_micro_batches(weights, biases, sinks(True), [Accumulation.DEFER] * 3 + [Accumulation.HAND_OVER])
    assert len(calls) == 4 and {id(p) for p in calls} == {id(p) for p in [*weights, *biases]}


def test_bfloat16_weights_are_summed_in_float32():
    """Sixteen small gradients behind a large one, each below half a unit in its last place in bfloat16."""
    weight = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    sink = GradientSink()

    def step(value: float, accumulation: Accumulation) -> None:
        x = torch.tensor([[value]], dtype=torch.bfloat16)
        nested_linears(x, [weight], None, (1,), 1, [sink], accumulation)[0].sum().backward()

    step(256.0, Accumulation.DEFER)
    assert sink.buffer.dtype == torch.float32
    for _ in range(15):
        step(0.5, Accumulation.DEFER)
    step(0.5, Accumulation.HAND_OVER)
    assert weight.grad.dtype == torch.bfloat16 and weight.grad.item() == 264.0
    assert not sink.buffer.any()


def test_bfloat16_agrees_with_float32():
    weights, biases = parameters(True, torch.bfloat16)
    doubles = [[p.detach().float().requires_grad_() for p in group] for group in (weights, biases)]
    run_micro_batches(weights, biases, sinks(True), [Accumulation.DEFER] * 3 + [Accumulation.HAND_OVER])
    run_micro_batches(*doubles, sinks(True), [Accumulation.DIRECT] * 4)
    for got, want in zip([*weights, *biases], [*doubles[0], *doubles[1]], strict=True):
        near(got.grad, want.grad, 0.02)


def test_float64_weights_have_float64_buffers():
    weights, _ = parameters(False, torch.float64)
    place = sinks(False)
    nested_linears(torch.randn(2, 3).double(), weights, None, (2, 2), 3, place, Accumulation.DEFER)[0].sum().backward()
    assert place[0].buffer.dtype == torch.float64


def test_deferring_makes_no_full_size_temporary():
    """Compute and memory of a narrow micro-batch go with its width; only the buffer itself is of full size, once."""
    weight = torch.randn(64, 96, requires_grad=True)
    bias = torch.randn(64, requires_grad=True)
    places = [GradientSink(), GradientSink()]
    for number in range(2):
        x = torch.randn(5, 8, requires_grad=True)
        with NewTensors() as made:
            nested_linears(x, [weight], [bias], (4,), 8, places, Accumulation.DEFER)[0].sum().backward()
        if number:
            # at most the input's gradient [5, 8] or the slice's own product [4, 8]
            assert made.largest <= 40, made.shapes
        else:
            assert made.largest == weight.numel() and made.shapes.count((64, 96)) == 1
