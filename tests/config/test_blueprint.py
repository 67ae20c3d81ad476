"""Patterns, sizes and the nest: what follows from a config, and what does not fit."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
from dataclasses import asdict, fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adamba.blueprint.nest import default_nest, row_index
from megatron_adamba.blueprint.pattern import MAX_BLOCKS, parse_pattern
from megatron_adamba.blueprint.resolve import attention_windows, resolve_model
from megatron_adamba.config.model import ModelConfig, NestRow
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.errors import ConfigError


def resolved(**changes) -> ResolvedModel:
    return resolve_model(ModelConfig(**{"block_pattern": "TM", "vocab_size": 11, **changes}))


@pytest.mark.parametrize(
    ("pattern", "letters"),
    [
        ("T", "T"),
        ("(TM)x10", "TM" * 10),
        ("Tx12 Mx8", "T" * 12 + "M" * 8),
        (" ( T M x2 ) x 2 ", "TMMTMM"),
        ("((TM)x2M)x2", "TMTMMTMTMM"),
        ("T()M", "TM"),
        ("transformer", "T"),
        (" Mamba ", "M"),
        (["transformer", "M", " mamba", "T"], "TMMT"),
    ],
)
def test_patterns(pattern, letters):
    assert parse_pattern(pattern, None) == tuple(letters)
    assert parse_pattern(pattern, len(letters)) == tuple(letters)


def test_no_pattern_is_attention_all_the_way():
    assert parse_pattern(None, 3) == ("T", "T", "T")


BAD_PATTERNS = [
    ("X", "'X': unknown block 'X' (blocks are T, M and E) at character 1; for example (TM)x4"),
    ("TXM", "unknown block 'X' (blocks are T, M and E) at character 2"),
    ("t", "unknown block 't'"),
    ("(T", "a '(' without its ')' at character 3"),
    ("T)", "a ')' without its '(' at character 2"),
    ("Tx0", "'x' needs a number of 1 or more after it at character 4"),
    ("Tx", "'x' needs a number of 1 or more after it at character 3"),
    ("Tx²", "'x' needs a number of 1 or more after it"),
    ("Tx-1", "'x' needs a number of 1 or more after it"),
    ("x3", "unknown block 'x'"),
    ("", "holds no block; for example --model.block_pattern (TM)x4"),
    ("()", "holds no block"),
    ([], "holds no block"),
    (["transfomer"], "unknown block 'transfomer'; blocks are T (transformer), M (mamba) and E (moe), e.g. transformer"),
    (["mumba"], "e.g. mamba"),
    ("Tx99999999999", f"more than {MAX_BLOCKS} blocks"),
    ("((Tx4000)x4000)x4000", f"more than {MAX_BLOCKS} blocks"),
]


@pytest.mark.parametrize(("pattern", "message"), BAD_PATTERNS, ids=[str(pattern) for pattern, _ in BAD_PATTERNS])
def test_patterns_that_say_nothing(pattern, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_pattern(pattern, None)


def test_a_depth_that_disagrees_with_the_pattern():
    with pytest.raises(ConfigError, match=r"--model.num_layers 3: the block pattern has 2 blocks; give --model.num_l"):
        parse_pattern("TM", 3)
    with pytest.raises(ConfigError, match=r"says nothing of the depth; add --model.num_layers 12, or --depth 12"):
        parse_pattern(None, None)


TREES = st.recursive(
    st.sampled_from("TM").map(lambda letter: (letter, letter)),
    lambda inner: st.tuples(st.lists(inner, min_size=1, max_size=3), st.integers(1, 3)).map(
        lambda node: (
            "(" + " ".join(text for text, _ in node[0]) + f")x{node[1]}",
            "".join(letters for _, letters in node[0]) * node[1],
        )
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(TREES, st.integers(1, 4)), min_size=1, max_size=3))
def test_any_pattern_means_what_it_spells(items):
    text = " ".join((inner if inner in "TM" else f"({inner})") + f"x{count}" for (inner, _), count in items)
    letters = "".join(spelled * count for (_, spelled), count in items)
    assert "".join(parse_pattern(text, None)) == letters


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(alphabet="TMEx()0123 ²-", max_size=12))
def test_any_other_text_is_read_or_refused_in_one_line(text):
    try:
        letters = parse_pattern(text, None)
    except ConfigError as error:
        assert "\n" not in str(error) and "--model.block_pattern" in str(error)
    else:
        assert letters and set(letters) <= {"T", "M", "E"}


def test_sizes_are_derived():
    config = resolved(hidden_size=320, head_dim=32, ffn_granule=64, widths=[80, 320])
    assert (config.num_layers, config.num_heads, config.num_kv_groups) == (2, 10, 10)
    assert (config.ffn_size, config.mamba_num_heads, config.static_norm_size) == (1280, 10, 320)
    # 8/3 of 320 is 853.3, up to the next granule
    assert resolved(hidden_size=320, activation="swiglu").ffn_size == 896
    assert resolved(hidden_size=320, activation="swiglu", ffn_granule=2).ffn_size == 854
    assert resolved(hidden_size=192, activation="swiglu", ffn_granule=1).ffn_size == 512
    assert resolve_model(config) == config


def test_a_resolved_config_is_the_config_with_every_size():
    config = resolved(block_pattern="TEM", num_experts=2, experts_per_token=1)
    plain = ModelConfig(**vars(config))
    assert config == plain and plain == config and asdict(config) == asdict(plain)
    assert config != replace(plain, vocab_size=12) and replace(plain, vocab_size=12) != config and config != 3
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), replace(config)):
        assert type(copied) is ResolvedModel and copied == config
    known = set(ResolvedModel.__annotations__)
    assert known <= {entry.name for entry in fields(ModelConfig)}
    assert not [name for name in known if getattr(config, name) is None]


def test_a_model_without_mamba_needs_no_mamba_sizes():
    assert resolved(block_pattern="TT", hidden_size=96, head_dim=8).hidden_size == 96


def test_resolving_leaves_the_given_config_alone():
    given_config = ModelConfig(block_pattern="TM", nest=[NestRow(256, 256, 4, 1024)])
    first = resolve_model(given_config, 5)
    first.nest[0].ffn = 64
    first.modes["x"] = 3
    assert given_config == ModelConfig(block_pattern="TM", nest=[NestRow(256, 256, 4, 1024)])


def test_the_tokenizers_vocabulary_must_be_the_models():
    assert resolve_model(ModelConfig(num_layers=1), 99).vocab_size == 99
    assert resolve_model(ModelConfig(num_layers=1, vocab_size=99), 99).vocab_size == 99
    with pytest.raises(ConfigError, match=r"--model.vocab_size 98: the tokenizer has 99 tokens; leave the flag out"):
        resolve_model(ModelConfig(num_layers=1, vocab_size=98), 99)


MISFITS = [
    ({"widths": [16, 300]}, "--model.widths: 300 does not fit a hidden size of 256; try 128"),
    ({"widths": [0, 256]}, "--model.widths: 0 does not fit"),
    ({"widths": [16, 64]}, "the last width must be the hidden size; try [16, 64, 256]"),
    ({"widths": [64, 16, 256]}, "must ascend without repeats; try [16, 64, 256]"),
    ({"widths": [16, 16, 256]}, "must ascend without repeats; try [16, 256]"),
    ({"ffn_size": 100}, "--model.ffn_size 100: must be a multiple of ffn_granule 64; try 128"),
    ({"ffn_size": 0}, "--model.ffn_size 0: must be a multiple of ffn_granule 64; try 64"),
    ({"num_heads": 6, "num_kv_groups": 4}, "--model.num_kv_groups 4: must divide num_heads 6; one of [1, 2, 3, 6]"),
    ({"head_dim": 7}, "--model.head_dim 7: RoPE needs an even number; try 8"),
    ({"head_dim": 512}, "--model.head_dim 512: larger than hidden_size 256"),
    ({"window_pattern": "SL"}, "give their size, e.g. --model.sliding_window 256"),
    ({"window_pattern": "S", "sliding_window": 0}, "--model.sliding_window 0: must be 1 or more"),
    ({"mamba_head_dim": 100}, "--model.mamba_head_dim 100: must divide mamba_expand * hidden_size = 512"),
    ({"mamba_num_groups": 3}, "--model.mamba_num_groups 3: must divide 8 heads; [1, 2, 4, 8]"),
    ({"mamba_version": 1, "mamba_num_heads": 4}, "--model.mamba_version 1: has no heads or groups"),
    ({"nest": []}, "--model.nest: is empty; leave it out, or give --model.widths [256]"),
    ({"nest": [NestRow(256, 256, 9, 1024)]}, "row of width 256: kv_groups 9 must lie between 1 and 4"),
    ({"nest": [NestRow(256, 256, 0, 1024)]}, "row of width 256: kv_groups 0 must lie between 1 and 4"),
    ({"nest": [NestRow(256, 256, 4, 1000)]}, "ffn 1000 must be a multiple of ffn_granule 64 up to 1024; try 1024"),
    ({"nest": [NestRow(256, 256, 4, 2048)]}, "ffn 2048 must be a multiple of ffn_granule 64 up to 1024; try 1024"),
    ({"nest": [NestRow(256, 0, 4, 1024)]}, "norm_size 0 must be 1 or more; try 256"),
    ({"nest": [NestRow(64, 64, 1, 64)]}, "the last width must be the hidden size"),
    ({"nest": [NestRow(256, 256, 4, 1024)], "widths": [8]}, "--model.widths [8]: the nest table has [256]"),
]


@pytest.mark.parametrize(("changes", "message"), MISFITS, ids=[str(changes) for changes, _ in MISFITS])
def test_sizes_that_do_not_fit_each_other(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolved(**changes)


def test_the_rows_of_a_new_nest():
    config = resolved(hidden_size=320, head_dim=32, num_kv_groups=5, ffn_size=1280, widths=[32, 65, 200, 320])
    assert config.nest == [
        NestRow(32, 32, 1, 128),  # 5 * 32 / 320 = 0.5 groups, 1280 * 32 / 320 = 128 rows
        NestRow(65, 65, 2, 320),  # 1.02 groups, 260 rows
        NestRow(200, 200, 4, 832),  # 3.125 groups, 800 rows
        NestRow(320, 320, 5, 1280),
    ]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_every_new_nest_nests(data):
    head_groups = data.draw(st.integers(1, 9))
    hidden = data.draw(st.integers(2, 400))
    granule = data.draw(st.sampled_from([1, 8, 64]))
    widths = sorted(data.draw(st.sets(st.integers(1, hidden), max_size=5)) | {hidden})
    config = resolved(
        block_pattern="T", hidden_size=hidden, head_dim=2, num_heads=2 * head_groups, num_kv_groups=head_groups,
        ffn_granule=granule, widths=widths,
    )  # fmt: skip
    rows = config.nest
    assert rows == default_nest(config) and [row.width for row in rows] == widths
    assert (rows[-1].kv_groups, rows[-1].ffn) == (head_groups, config.ffn_size)
    for row in rows:
        assert row.norm_size == row.width
        assert (row.kv_groups - 1) * hidden < head_groups * row.width <= row.kv_groups * hidden
        assert row.ffn % granule == 0 and row.ffn * hidden >= config.ffn_size * row.width
        assert (row.ffn - granule) * hidden < config.ffn_size * row.width
    for narrow, wide in itertools.pairwise(rows):
        assert narrow.kv_groups <= wide.kv_groups and narrow.ffn <= wide.ffn


def test_windows_go_round_over_the_attention_layers():
    config = resolved(block_pattern="TMTTMT", window_pattern="SSL", sliding_window=9)
    assert attention_windows(config) == [9, None, 9, None, None, 9]


def test_a_width_is_looked_up():
    config = resolved(widths=[64, 128, 256])
    assert [row_index(config, width) for width in config.widths] == [0, 1, 2]
    with pytest.raises(ConfigError, match=r"width 120: not in the nest of this model \(\[64, 128, 256\]\); try 128"):
        row_index(config, 120)
