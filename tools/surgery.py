"""Operations on checkpoints that keep what the model computes; each streams from one folder into a new one.

python tools/surgery.py import gpt-oss gpt-oss-20b/original runs/gpt-oss-20b
python tools/surgery.py graft runs/gpt-oss-20b runs/hybrid --pattern "(EEM)x12" --mamba-num-heads 256
python tools/surgery.py export hf runs/gpt-oss-20b runs/gpt-oss-20b-hf
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_adamba.config.script import run_script
from megatron_adamba.errors import ConfigError

MAMBA_FLAGS = {
    "mamba_version": "2 (SSD) or 1 (selective scan)",
    "mamba_expand": "inner size in units of the hidden size, where heads are not given",
    "mamba_num_heads": "Mamba-2 heads",
    "mamba_head_dim": "channels of a Mamba-2 head",
    "mamba_num_groups": "Mamba-2 groups that share B and C",
    "mamba_d_state": "state size",
}
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    operations = parser.add_subparsers(dest="operation", required=True)

    kinds = operations.add_parser("import", help="a published checkpoint as a canonical one")
    kinds = kinds.add_subparsers(dest="kind", required=True)
    command = kinds.add_parser("gpt-oss", help="OpenAI's original/ or transformers' folder; bf16, fp32 or MXFP4")
    _add_folders(command)
    command.add_argument("--widths", help="of the nest, e.g. 180,720,1440,2880 (1/16, 1/4, 1/2 and all by default)")
    command.add_argument("--tokenizer", metavar="FILE", help="to copy; SRC/tokenizer.json by default")

    kinds = operations.add_parser("export", help="a canonical checkpoint for other software")
    kinds = kinds.add_subparsers(dest="kind", required=True)
    command = kinds.add_parser("hf", help="for transformers' GptOssForCausalLM")
    _add_folders(command)
    command.add_argument("--dtype", choices=("bf16", "fp32"), help="of all tensors; the source's by default")

    command = operations.add_parser("graft", help="new Mamba blocks between the old blocks")
    _add_folders(command)
    command.add_argument("--pattern", required=True, help='of all blocks, e.g. "(EEM)x12"')
    command.add_argument("--seed", type=int, default=1234, help="of the new weights")
    for name, text in MAMBA_FLAGS.items():
        command.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=text)
    return parser.parse_args(words)


def _add_folders(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="SRC", type=Path, help="folder to read")
    command.add_argument("target", metavar="DST", type=Path, help="folder to make; nothing is written over")
    command.add_argument("--max-shard-size", default="4GB", metavar="SIZE", help="of one file, e.g. 500MB")
    command.add_argument("--dry-run", action="store_true", help="check, and show every tensor to be written")


def parse_size(text: str) -> int:
    """Bytes of `4GB`, `512MiB` or `1000`. Raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in UNITS or not float(found[1]) * UNITS[found[2].upper()] >= 1:
        raise ConfigError(f"--max-shard-size {text}: is no size; for example --max-shard-size 4GB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def parse_widths(text: str | None) -> list[int] | None:
    """`64,128` as a list. Raises ConfigError."""
    if text is None:
        return None
    try:
        return [int(word) for word in text.strip("[] ").split(",")]
    except ValueError:
        raise ConfigError(f"--widths {text}: must be whole numbers; for example --widths 180,720,1440,2880") from None


def plan(args: argparse.Namespace):
    """The job that the words ask for, checked."""
    import torch

    if args.operation == "import":
        from megatron_adamba.surgery.import_gpt_oss import import_gpt_oss

        return import_gpt_oss(args.source, parse_widths(args.widths), Path(args.tokenizer) if args.tokenizer else None)
    if args.operation == "export":
        from megatron_adamba.surgery.export_gpt_oss import export_hugging_face

        dtypes = {None: None, "bf16": torch.bfloat16, "fp32": torch.float32}
        return export_hugging_face(args.source, dtypes[args.dtype])
    from megatron_adamba.surgery.graft import graft

    given = {name: value for name in MAMBA_FLAGS if (value := getattr(args, name)) is not None}
    return graft(args.source, args.pattern, given, args.seed)


def main(words: list[str]) -> int:
    args = parse(words)
    max_shard_bytes = parse_size(args.max_shard_size)

    from megatron_adamba.surgery.sources import DTYPE_NAMES
    from megatron_adamba.surgery.writing import check_target, write_job

    check_target(args.target)
    job = plan(args)
    if args.dry_run:
        for tensor in job.tensors:
            print(f"{tensor.name}  {list(tensor.shape)} {DTYPE_NAMES[tensor.dtype]}  <- {tensor.origin}")
    else:
        write_job(job, args.target, max_shard_bytes, show_progress if sys.stderr.isatty() else lambda *_: None)
    made = "would hold" if args.dry_run else "holds"
    size = f"{len(job.tensors)} tensors, {job.num_bytes / 1e9:.3f} GB, in {job.num_shards(max_shard_bytes)} files"
    print(f"{args.target} {made} {size}; {job.promise}")
    return 0


def show_progress(name: str, num_bytes: int, seconds: float) -> None:
    rate = f"{num_bytes / 1e6 / seconds:9.1f} MB/s" if seconds > 0 else ""
    print(f"{name:48} {num_bytes / 1e6:10.1f} MB {rate}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
