"""Memory is bounded by the largest tensor, not by the model: measured in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = """
import atexit, sys
sys.path.insert(0, sys.argv.pop(1))
from megatron_adamba.commands.main import door
lines = lambda: (line.split() for line in open("/proc/self/status"))
atexit.register(lambda: print("peak", next(words[1] for words in lines() if words[0] == "VmHWM:")))
door("surgery")
"""
"""not getrusage: its peak counts the process that forked this one"""
BYTES = {"F32": 4, "BF16": 2, "U8": 1}


def write_zeros(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """A safetensors file of zeros, mostly holes."""
    header, end = {}, 0
    for name, (kind, shape) in tensors.items():
        start, end = end, end + prod(shape) * BYTES[kind]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    with open(path, "wb") as stream:
        stream.write(len(content).to_bytes(8, "little") + content)
        stream.truncate(8 + len(content) + end)


def openai_folder(folder: Path, packed: bool, layers: int, hidden: int, vocab: int, experts: int) -> int:
    """A checkpoint of zeros; returns the bytes of the largest tensor of its canonical form."""
    heads, groups, head_dim, rows, kind = 8, 2, 64, hidden, "F32"
    query, key = heads * head_dim, groups * head_dim
    tensors = {
        "embedding.weight": (kind, (vocab, hidden)),
        "norm.scale": (kind, (hidden,)),
        "unembedding.weight": (kind, (vocab, hidden)),
    }
    block = {
        "attn.norm.scale": (hidden,),
        "attn.qkv.weight": (query + 2 * key, hidden),
        "attn.qkv.bias": (query + 2 * key,),
        "attn.sinks": (heads,),
        "attn.out.weight": (hidden, query),
        "attn.out.bias": (hidden,),
        "mlp.norm.scale": (hidden,),
        "mlp.gate.weight": (experts, hidden),
        "mlp.gate.bias": (experts,),
        "mlp.mlp1_bias": (experts, 2 * rows),
        "mlp.mlp2_bias": (experts, hidden),
    }
    matrices = {"mlp.mlp1_weight": (experts, 2 * rows, hidden), "mlp.mlp2_weight": (experts, hidden, rows)}
    for layer in range(layers):
        tensors |= {f"block.{layer}.{name}": (kind, shape) for name, shape in block.items()}
        for name, shape in matrices.items():
            full = f"block.{layer}.{name}"
            if packed:
                groups_of_32 = (*shape[:2], shape[2] // 32)
                tensors[f"{full}.blocks"] = ("U8", (*groups_of_32, 16))
                tensors[f"{full}.scales"] = ("U8", groups_of_32)
            else:
                tensors[full] = (kind, shape)
    folder.mkdir()
    write_zeros(folder / "model.safetensors", tensors)
    config = {
        "num_hidden_layers": layers, "num_experts": experts, "experts_per_token": 2, "vocab_size": vocab,
        "hidden_size": hidden, "intermediate_size": rows, "swiglu_limit": 7.0, "head_dim": head_dim,
        "num_attention_heads": heads, "num_key_value_heads": groups, "sliding_window": 128,
        "initial_context_length": 4096, "rope_theta": 150000, "rope_scaling_factor": 32.0, "rope_ntk_alpha": 1,
        "rope_ntk_beta": 32,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return max(4 * vocab * hidden, experts * rows * hidden * (2 if packed else 4))


def peak(*words: object) -> int:
    """Bytes of the largest resident set of `adamba surgery WORDS`."""
    program = [sys.executable, "-c", PROGRAM, str(ROOT), *map(str, words)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("peak ")[1]) * 1024


def peaks_of(root: Path, name: str, packed: bool, **sizes) -> tuple[int, int, dict[str, int]]:
    """Import one model, and graft and export it: bytes of its largest tensor, of all, and the peaks."""
    source, base = root / f"{name}-source", root / name
    largest = openai_folder(source, packed, **sizes)
    peaks = {"import": peak("import", "gpt-oss", source, base)}
    total = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    if not packed:
        pattern = "E" * sizes["layers"] + "M"
        peaks["graft"] = peak("graft", base, root / f"{name}-hybrid", "--pattern", pattern)
        peaks["export"] = peak("export", "hf", base, root / f"{name}-hf")
    return largest, total, peaks


CASES = {
    "embedding": (False, {"layers": 3, "vocab": 16384, "experts": 4}),
    "experts": (False, {"layers": 2, "vocab": 1024, "experts": 10}),
    "MXFP4 experts": (True, {"layers": 2, "vocab": 1024, "experts": 20}),
}
"""by what is largest"""


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_peaks(name, tmp_path):
    """The rule is three times the largest tensor. Of what an export writes, the fused experts are twice as large."""
    packed, sizes = CASES[name]
    _, _, tiny = peaks_of(tmp_path, "tiny", packed, layers=1, hidden=64, vocab=64, experts=2)
    largest, total, large = peaks_of(tmp_path, "large", packed, hidden=1536, **sizes)
    assert total > 4 * largest, "what held the whole model would not show"
    growth = {operation: (large[operation] - tiny[operation]) / largest for operation in large}
    print({operation: f"{value:.2f} of the largest tensor" for operation, value in growth.items()})
    assert max(growth.values()) < 3, growth
    assert growth["import"] < 2, growth
