"""Layers shared out over two ranks against the same layers on one, against torch, and against Megatron-core."""

from __future__ import annotations

import pytest

SEQUENCE = pytest.mark.parametrize("sp", [False, True], ids=["whole", "sequence shared"])
EXACT = 1e-11
"""bound in float64; far below what any term left out would make"""


def check(workers, module: str, function: str, bound: float, **arguments) -> None:
    """All ranks' deviations lie within the bound; nan does not."""
    for rank, found in enumerate(workers(2).run(module, function, **arguments)):
        assert found
        wrong = {what: off for what, off in found.items() if not off <= bound}
        assert not wrong, f"rank {rank}: {wrong}"


@pytest.mark.oracle
@SEQUENCE
def test_column_and_row_parallel_linears_are_those_of_megatron_core(workers, sp):
    check(workers, "megatron_jobs", "linears", 1e-5, sp=sp)


@pytest.mark.oracle
@pytest.mark.parametrize("vocab", [8, 54])
def test_token_losses_are_those_of_megatron_core(workers, vocab):
    for deviation in workers(2).run("megatron_jobs", "token_losses", vocab=vocab):
        assert deviation <= 1e-5


HEAD_CASES = [
    (53, 0.0, 2, 6, 0.3, 1.0),
    (53, 15.0, 2, 6, 0.3, 1.0),
    (53, 2.0, 2, 6, 0.0, 50.0),
    (53, 0.0, 2, 6, 0.3, 300.0),
    (7, 5.0, 3, 4, 0.5, 1.0),
    (7, 0.0, 1, 2, 1.0, 1.0),
    (53, 15.0, 0, 6, 0.3, 1.0),
    (4100, 0.0, 2, 302, 0.2, 1.0),
    (4100, 15.0, 3, 200, 0.2, 3.0),
    (4096, 0.0, 1, 4, 1.0, 1.0),
]
"""(vocabulary, softcap, batch, seq, share of labels left out, factor on the logits)"""


@SEQUENCE
@pytest.mark.parametrize(("dtype", "bound"), [("float64", EXACT), ("float32", 1e-5), ("bfloat16", 0.03)])
def test_the_shared_head_is_torchs_cross_entropy(workers, sp, dtype, bound):
    cases = HEAD_CASES if dtype == "float64" else [case for case in HEAD_CASES if case[-1] <= 3]
    for rank, answers in enumerate(workers(2).run("layer_jobs", "head_cases", sp=sp, dtype=dtype, cases=cases)):
        assert len(answers) == len(cases)
        for case, found in answers.items():
            assert len(found) == 9
            wrong = {what: off for what, off in found.items() if not off <= bound}
            assert not wrong, f"rank {rank}, {case}: {wrong}"


SUBLAYERS = {
    "attention": ("attention", {}),
    "attention without biases": ("attention", {"linear_bias": False, "num_heads": 4, "qk_norm": False}),
    "attention with a window": ("attention", {"sliding_window": 3, "window_pattern": "S"}),
    "relu2": ("mlp", {}),
    "swiglu": ("mlp", {"activation": "swiglu"}),
    "swiglu without biases": ("mlp", {"activation": "swiglu", "linear_bias": False}),
    "norm": ("attention_norm", {}),
    "norm without weights": ("mlp_norm", {"norm_weight": False}),
    "static norm": ("mixer_norm", {}),
    "mamba 2": ("mixer", {}),
    "mamba 2, other heads": ("mixer", {"mamba_num_heads": 6, "mamba_num_groups": 2}),
    "mamba 1": ("mixer", {"mamba_version": 1}),
}


@SEQUENCE
@pytest.mark.parametrize("name", SUBLAYERS)
def test_a_shared_layer_is_the_whole_one_at_every_width(workers, name, sp):
    layer, changes = SUBLAYERS[name]
    # Mamba's decays are computed in float32 whatever the weights are kept in
    bound = 1e-6 if layer == "mixer" else EXACT
    check(workers, "layer_jobs", "sublayer", bound, name=layer, sp=sp, changes=changes)


@SEQUENCE
@pytest.mark.parametrize("name", ["attention", "swiglu", "norm", "mamba 2", "mamba 1"])
@pytest.mark.parametrize(("batch", "seq"), [(0, 6), (1, 2)])
def test_a_shared_layer_without_tokens_and_with_few(workers, name, sp, batch, seq):
    layer, changes = SUBLAYERS[name]
    bound = 1e-6 if layer == "mixer" else EXACT
    check(workers, "layer_jobs", "sublayer", bound, name=layer, sp=sp, changes=changes, batch=batch, seq=seq)


@SEQUENCE
@pytest.mark.parametrize("seq", [6, 70])
def test_shared_attention_over_one_document(workers, sp, seq):
    """Without a mask the length chooses the kernel; at the narrowest width rank 1 has no head for either of them."""
    options = {"name": "attention", "sp": sp, "changes": {}, "seq": seq, "packed": False}
    check(workers, "layer_jobs", "sublayer", EXACT, **options)


@SEQUENCE
@pytest.mark.parametrize("name", ["attention", "relu2", "mamba 2", "mamba 1"])
def test_a_shared_layer_in_fp32(workers, name, sp):
    layer, changes = SUBLAYERS[name]
    check(workers, "layer_jobs", "sublayer", 1e-5, name=layer, sp=sp, changes=changes, dtype="float32")


@SEQUENCE
@pytest.mark.parametrize("vocab", [53, 7, 4100])
@pytest.mark.parametrize("changes", [{"tie_embeddings": True, "logit_softcap": 3.0}, {"embedding_norm": True}], ids=str)
def test_shared_ends_are_the_whole_ones(workers, vocab, changes, sp):
    check(workers, "layer_jobs", "ends", EXACT, sp=sp, vocab=vocab, changes=changes)


PLANS = [((32, 32, 32), 3), ((8, 8, 8), 3), ((21, 21, 21), 3), ((8, 32, 21), 3), ((21, 8, 32), 1), ((32, 21, 8), 2)]
MODELS = {
    "mamba 2": {},
    "mamba 1, tied, swiglu": {"mamba_version": 1, "tie_embeddings": True, "activation": "swiglu", "logit_softcap": 4.0},
    "no rows for rank 1": {"nest": None, "widths": [8, 21, 32], "ffn_size": 16},
    "no MLP behind Mamba": {"mamba_use_mlp": False, "embedding_norm": True, "norm_weight": False},
}


@SEQUENCE
@pytest.mark.parametrize("name", MODELS)
def test_a_shared_model_is_the_whole_one(workers, name, sp):
    """A sequence that two ranks cannot share evenly, packed documents, mixed widths, early exits."""
    check(workers, "layer_jobs", "whole_model", 1e-6, sp=sp, changes=MODELS[name], plans=PLANS, seq=7)


@SEQUENCE
@pytest.mark.parametrize(("batch", "seq"), [(2, 1), (0, 4), (1, 6)])
def test_a_shared_model_on_short_and_empty_batches(workers, sp, batch, seq):
    check(workers, "layer_jobs", "whole_model", 1e-6, sp=sp, changes={}, plans=PLANS[:4], batch=batch, seq=seq)


@SEQUENCE
@pytest.mark.parametrize("freeze", [["embedding"], ["attention", "mlp", "gain"], ["mamba", "norm", "head"]], ids=str)
def test_a_shared_model_with_frozen_groups(workers, sp, freeze):
    check(workers, "layer_jobs", "whole_model", 1e-6, sp=sp, changes={}, plans=PLANS[2:5], freeze=freeze)


@SEQUENCE
def test_a_shared_model_that_recomputes(workers, sp):
    check(workers, "layer_jobs", "whole_model", 1e-6, sp=sp, changes={}, plans=PLANS[1:5], recompute=True)


@SEQUENCE
def test_a_shared_model_in_fp32_and_bf16(workers, sp):
    bounds = {"float32": {"loss": 1e-5, "logits": 1e-5}, "bfloat16": {"loss": 0.01, "logits": 0.05}}
    for dtype, allowed in bounds.items():
        found = workers(2).run("layer_jobs", "whole_model", sp=sp, changes={}, plans=PLANS[:4], dtype=dtype)[0]
        for what, off in found.items():
            limit = allowed.get(what.split()[-1])
            assert limit is None or off <= limit, f"{dtype} {what}: {off}"
