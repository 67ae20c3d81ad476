"""import and export: checkpoints of other software."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from megatron_adamba.commands.command import Command, Group
from megatron_adamba.commands.surgery.jobs import add_source, add_target, job_command, parse_whole_numbers
from megatron_adamba.config.parser import CommandParser

CODE_SETTINGS = {
    "rope_base": (float, "base of the rotary frequencies; 10000 in the first release"),
    "qk_scale": (float, "factor on queries and keys behind their norm; 1 in the first release, and 1 alone is read"),
    "softcap": (float, "of the logits, 0 for none; 15 in the first release"),
    "window": (int, "keys before a token's own that a layer S of window_pattern sees"),
}
"""what nanochat's files do not say"""


def _add_nest(parser: CommandParser) -> None:
    parser.add_argument("--widths", help="of the nest, e.g. 180,720,1440,2880 (1/16, 1/4, 1/2 and all by default)")
    parser.add_argument("--tokenizer", metavar="FILE", type=Path, help="to take along; the one in SRC by default")
    text = "end-of-document token, if it is not one of the usual ones"
    parser.add_argument("--eod-token", metavar="NAME", help=text)
    text = "of a .tiktoken file: encoding that it was made with, or regular expression; the model's makers' by default"
    parser.add_argument("--split-pattern", metavar="NAME", help=text)


def _add_nanochat(parser: CommandParser) -> None:
    parser.add_argument("--step", type=int, help="which of several; the last by default")
    for name, (kind, text) in CODE_SETTINGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)


def _add_nanochat_target(parser: CommandParser) -> None:
    add_source(parser)
    add_target(parser)
    parser.add_argument("--step", type=int, default=0, help="what it calls itself")
    parser.add_argument("--dry-run", action="store_true", help="check, and show every tensor to be written")
    _add_dtype(parser)


def _add_dtype(parser: CommandParser) -> None:
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="of all tensors; the source's by default")


def _nest(args: Namespace) -> dict:
    from megatron_adamba.surgery.importing import TokenizerChoice

    return {
        "widths": parse_whole_numbers("--widths", args.widths, "180,720,1440,2880"),
        "tokenizer": TokenizerChoice(args.tokenizer, args.eod_token, args.split_pattern),
    }


def _dtype(args: Namespace):
    import torch

    return {None: None, "bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]


def _import_gpt_oss(args: Namespace):
    from megatron_adamba.surgery.import_gpt_oss import import_gpt_oss

    return import_gpt_oss(args.source, **_nest(args))


def _import_hugging_face(args: Namespace):
    from megatron_adamba.surgery.import_hf import import_hugging_face

    return import_hugging_face(args.source, **_nest(args))


def _import_nanochat(args: Namespace):
    from megatron_adamba.surgery.import_nanochat import import_nanochat
    from megatron_adamba.surgery.nanochat_config import CodeSettings

    code = CodeSettings(**{name: getattr(args, name) for name in CODE_SETTINGS})
    return import_nanochat(args.source, args.step, code, **_nest(args))


def _export_hugging_face(args: Namespace):
    from megatron_adamba.surgery.export_hf import export_by_blocks

    return export_by_blocks(args.source, _dtype(args))


def _export_nanochat(args: Namespace) -> int:
    """A file of its own kind, so it is not `jobs` that writes it."""
    from megatron_adamba.commands.progress import progress_bar
    from megatron_adamba.surgery.export_nanochat import export_nanochat
    from megatron_adamba.surgery.nanochat_writing import write_nanochat
    from megatron_adamba.surgery.sources import DTYPE_NAMES
    from megatron_adamba.surgery.writing import check_target

    check_target(args.target)
    job = export_nanochat(args.source, args.step, _dtype(args))
    if args.dry_run:
        for tensor in job.tensors:
            print(f"{tensor.name}  {list(tensor.shape)} {DTYPE_NAMES[tensor.dtype]}  <- {tensor.origin}")
    else:
        with progress_bar("writing", job.num_bytes, "bytes") as bar:
            write_nanochat(job, args.target, lambda name, num_bytes, seconds: bar.advance(num_bytes))
    made = "would hold" if args.dry_run else "holds"
    print(f"{args.target} {made} {len(job.tensors)} tensors, {job.num_bytes / 1e9:.3f} GB, in 1 file; {job.promise}")
    return 0


IMPORT = Group(
    "a published checkpoint as a canonical one",
    {
        "gpt-oss": job_command(
            "OpenAI's original/ or transformers' folder; bf16, fp32 or MXFP4",
            _import_gpt_oss,
            _add_nest,
            examples=("adamba surgery import gpt-oss gpt-oss-20b/original runs/gpt-oss-20b",),
        ),
        "hf": job_command(
            "transformers' folder of NanoChatForCausalLM or GptOssForCausalLM", _import_hugging_face, _add_nest
        ),
        "nanochat": job_command(
            "nanochat's folder of model_NNNNNN.pt and meta_NNNNNN.json", _import_nanochat, _add_nanochat, _add_nest
        ),
    },
)
EXPORT = Group(
    "a canonical checkpoint for other software",
    {
        "hf": job_command(
            "for transformers' NanoChatForCausalLM or GptOssForCausalLM, by what the model is",
            _export_hugging_face,
            _add_dtype,
            examples=("adamba surgery export hf runs/gpt-oss-20b runs/gpt-oss-20b-hf",),
        ),
        "nanochat": Command(
            "for nanochat: model_NNNNNN.pt and meta_NNNNNN.json, as in its first release",
            _add_nanochat_target,
            _export_nanochat,
        ),
    },
)
