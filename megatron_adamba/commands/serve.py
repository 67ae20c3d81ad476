"""serve: a server for OpenAI's clients, and a chat page that shows the compute that each token took."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields
from pathlib import Path

from megatron_adamba.commands.command import Command
from megatron_adamba.config.parser import CommandParser
from megatron_adamba.config.rules import in_range


def add_options(parser: CommandParser) -> None:
    parser.add_argument("--model", required=True, help="folder of a canonical checkpoint, e.g. RUN/model")
    parser.add_argument("--name", help="of the model in answers; its folder by default")
    parser.add_argument("--host", default="127.0.0.1", help="this machine alone by default; there is no password")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one and prints it")
    parser.add_argument("--dtype", help="bf16 | fp32; by default bf16 where the machine has it")
    parser.add_argument("--no-verify", action="store_true", help="do not hold tensors against their checksums")
    parser.add_argument("--body-bytes", type=int, default=1 << 20, help="of the largest request")
    parser.add_argument("--new-tokens", type=int, default=1024, help="that one text may have")
    parser.add_argument("--context", type=int, default=4096, help="tokens of prompt and text together")
    parser.add_argument("--slots", type=int, default=8, help="texts that are made side by side")
    parser.add_argument("--queue", type=int, default=256, help="texts that wait; more are answered with 429")
    parser.add_argument("--choices", type=int, default=32, help="texts of one request")
    parser.add_argument("--connections", type=int, default=512, help="that may be open at once")
    text = "that a request may take to arrive, and an answer to be read on"
    parser.add_argument("--request-seconds", type=float, default=30, help=text)
    parser.add_argument("--shutdown-seconds", type=float, default=5, help="that answers have to end at SIGTERM")
    text = "a name that others reach it by (Host); others are refused; may be repeated; * allows all"
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help=text)


def run(args: Namespace) -> int:
    from megatron_adamba.inference.load import load_model
    from megatron_adamba.inference.serving.hosts import allowed_hosts
    from megatron_adamba.inference.serving.limits import ServerLimits
    from megatron_adamba.inference.serving.server import bound_sockets, listen, make_server

    in_range("--port", args.port, 0, 65535, 8000)
    limits = ServerLimits(**{entry.name: getattr(args, entry.name) for entry in fields(ServerLimits)})
    limits.check()
    allowed_hosts(args.host, args.allow_host)
    # before the model, which takes its time
    sockets = bound_sockets(args.host, args.port)
    try:
        loaded = load_model(args.model, args.dtype, verify=not args.no_verify)
        folder = Path(args.model).resolve()
        name = args.name or (folder.parent.name if folder.name == "model" else folder.name)
        server = make_server(loaded, name, limits, args.host, args.port, args.allow_host)
        listen(sockets, args.host, args.port)
        server.run(sockets)
    finally:
        for bound in sockets:
            bound.close()
    return 0


COMMAND = Command(
    "a server for OpenAI's clients, with a chat page",
    add_options,
    run,
    details="The chat page shows the compute that each token took.",
    examples=(
        "adamba serve --model runs/quickstart/model",
        "curl localhost:8000/v1/completions -H 'Content-Type: application/json' "
        """-d '{"prompt": "def ", "mode": "adaptive"}'""",
    ),
)
