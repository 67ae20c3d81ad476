"""Options that say how much compute a text may take and how its tokens are chosen."""

from __future__ import annotations

from argparse import Namespace

from megatron_adamba.config.parser import CommandParser, number
from megatron_adamba.config.rules import count


def add_model_options(parser: CommandParser) -> None:
    parser.add_argument("--model", required=True, help="folder of a canonical checkpoint, e.g. RUN/model")
    parser.add_argument("--dtype", help="bf16 | fp32; by default bf16 where the machine has it")
    parser.add_argument("--no-verify", action="store_true", help="do not hold tensors against their checksums")
    parser.add_argument("--stats", action="store_true", help="width, exit layer and compute of each token")


def add_mode_options(parser: CommandParser) -> None:
    group = parser.add_argument_group("compute")
    group.add_argument("--mode", default="think", help="full | ghost | whisper | normal | think | adaptive")
    group.add_argument("--width", type=int, help="a width of the nest instead of a mode")
    group.add_argument("--exit-threshold", type=float, help="adaptive: confidence above which a token leaves (0.95)")
    group.add_argument("--expand-cost", type=number, help="adaptive: expected nats to widen above (0.5); inf: never")
    group.add_argument("--min-exit-layer", type=int, help="adaptive: blocks before the first exit (as trained)")
    group.add_argument("--exit-per", help="adaptive: token | sequence")
    group.add_argument("--energy-price", type=number, help="adaptive: nats that all compute is worth; else by lookup")
    group.add_argument("--min-width", type=int, help="adaptive: the estimator chooses none under it")
    group.add_argument("--full-width", action="store_true", help="adaptive: exits alone, the estimator is not asked")


def add_sampling_options(parser: CommandParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-new-tokens", type=int, default=128)
    group.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    group.add_argument("--top-k", type=int, default=0, help="0 turns it off")
    group.add_argument("--top-p", type=float, default=0.95)
    group.add_argument("--repetition-penalty", type=float, default=1.0, help="1 turns it off")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the text; may be repeated")
    group.add_argument("--seed", type=int, default=0)


def chosen_sampling(args: Namespace):
    """The `Sampling` of the options. Raises ConfigError."""
    from megatron_adamba.inference.sampling import Sampling

    count("--max-new-tokens", args.max_new_tokens, 2**24)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.repetition_penalty, args.seed)
    sampling.check()
    return sampling


def chosen_mode(args: Namespace):
    """The `Mode` of the options."""
    from megatron_adamba.inference.modes import Mode

    names = ("exit_threshold", "expand_cost", "min_exit_layer", "exit_per", "min_width")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return Mode(args.mode, args.width, given, args.energy_price, predict=not args.full_width)
