"""import and export: checkpoints of other software."""

from __future__ import annotations

import argparse
from pathlib import Path

from surgery_commands.jobs import add_job, parse_whole_numbers


def add(commands) -> None:
    command = commands.add_parser("import", help="a published checkpoint as a canonical one")
    kinds = command.add_subparsers(dest="kind", required=True)
    text = "OpenAI's original/ or transformers' folder; bf16, fp32 or MXFP4"
    command = add_job(kinds, "gpt-oss", text, _import_gpt_oss)
    command.add_argument("--widths", help="of the nest, e.g. 180,720,1440,2880 (1/16, 1/4, 1/2 and all by default)")
    command.add_argument("--tokenizer", metavar="FILE", help="to copy; SRC/tokenizer.json by default")

    command = commands.add_parser("export", help="a canonical checkpoint for other software")
    kinds = command.add_subparsers(dest="kind", required=True)
    command = add_job(kinds, "hf", "for transformers' GptOssForCausalLM", _export_hugging_face)
    command.add_argument("--dtype", choices=("bf16", "fp32"), help="of all tensors; the source's by default")


def _import_gpt_oss(args: argparse.Namespace):
    from megatron_adamba.surgery.import_gpt_oss import import_gpt_oss

    widths = parse_whole_numbers("--widths", args.widths, "180,720,1440,2880")
    return import_gpt_oss(args.source, widths, Path(args.tokenizer) if args.tokenizer else None)


def _export_hugging_face(args: argparse.Namespace):
    import torch

    from megatron_adamba.surgery.export_gpt_oss import export_hugging_face

    dtypes = {None: None, "bf16": torch.bfloat16, "fp32": torch.float32}
    return export_hugging_face(args.source, dtypes[args.dtype])
