"""The command line: presets, files, the depth dial and dotted overrides in layers, each value with its source."""

from __future__ import annotations

import dataclasses
import importlib.resources
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from megatron_adamba.config.depth import REASONS, derive_from_depth
from megatron_adamba.config.ds_config import shipped_ds_configs
from megatron_adamba.config.model import NestRow
from megatron_adamba.config.parser import CommandParser
from megatron_adamba.config.peer_flags import peer_hint
from megatron_adamba.config.root import AdambaConfig, find_tokenizer, read_model_config, read_run_config
from megatron_adamba.config.rules import nearest
from megatron_adamba.config.sections import ElasticStage
from megatron_adamba.errors import ConfigError
from megatron_adamba.schema import read_regular

_DEPTH = "depth"
_ROWS: dict[str, type[NestRow] | type[ElasticStage]] = {"model.nest": NestRow, "elastic.schedule": ElasticStage}
"""settings that are lists of sections"""
_DEEPEST = 500
"""brackets of a word; the parser of lists goes down without end"""
_INIT_FROM = "checkpoint.init_from"
_OF_GATES = (
    "gates.target",
    "gates.tau",
    "gates.predictor",
    "gates.regret_scale",
    "gates.prompt_tokens",
    "elastic.min_exit_layer",
)
"""what says how a model's gates are to be read"""


@dataclass
class ParsedArguments:
    """A checked config and where each value came from."""

    config: AdambaConfig
    sources: dict[str, str]
    """flat key -> default | preset NAME | --depth N | FILE | command line"""
    deepspeed_config: str | None = None
    """path of the ds_config, None for the built-in one"""
    print_config: bool = False
    summary: bool = False
    depth: int | None = None
    derived: dict[str, Any] = field(default_factory=dict)
    """what the depth dial set and nothing later overrode"""
    inputs: list[str] = field(default_factory=list)
    """texts to make the dataset from"""
    minutes: float = 10.0
    has_preset: bool = False


def preset_names() -> list[str]:
    folder = importlib.resources.files("megatron_adamba.config").joinpath("presets")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def build_parser(prog: str) -> CommandParser:
    """The parser of every script that takes a whole config."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = CommandParser(
        prog=prog,
        usage="%(prog)s [--preset NAME] [--config FILE] [--depth N] [--SECTION.FIELD VALUE ...]",
        description="Train an elastic hybrid language model.\n\n"
        "Later wins: defaults, preset, config file, command line. Lists are written a,b or\n[a,b]; null unsets.",
        examples=(
            "adamba train --input book.txt --minutes 10",
            "adamba train --preset tiny-hybrid --print_config --summary",
            "adamba train --preset tiny-hybrid --logging.run_dir runs/first",
            "deepspeed --num_gpus 8 --module megatron_adamba train --preset adamba-6b",
        ),
    )
    parser.add_argument("--preset", type=str, help="one of " + ", ".join(preset_names()))
    parser.add_argument(
        "--config",
        action="append",
        type=str,
        help="YAML file with the same sections as the presets; of several, later wins",
    )
    parser.add_argument("--depth", type=int, help="one dial: derives layers, hidden size, heads, batch, learning rates")
    parser.add_argument(
        "--deepspeed_config",
        type=str,
        help=f"what DeepSpeed owns: a JSON file, or one of ours: {', '.join(shipped_ds_configs())}",
    )
    text = "texts of your own: files or folders; makes tokenizer and dataset, trains, evaluates, all in one run folder"
    parser.add_argument("--input", nargs="+", type=str, metavar="PATH", help=text)
    parser.add_argument("--minutes", type=float, help="with --input: what all of it may take; 10 by default")
    parser.add_argument("--local_rank", type=int, help="given by launchers; the environment decides")
    parser.add_argument("--resume", type=str, help="short for --checkpoint.resume")
    parser.add_argument("--print_config", action="store_true", help="show each value and where it came from, and stop")
    parser.add_argument("--summary", action="store_true", help="with --print_config: parameters and FLOPs per width")
    for name, section in get_type_hints(AdambaConfig).items():
        parser.add_class_arguments(section, name)
    return parser


def parse_arguments(argv: Sequence[str], prog: str = "adamba train") -> ParsedArguments:
    """Layers, lowest first: defaults, preset, the model of `--checkpoint.init_from`, `--config` files, command line.

    `depth` in any of the last three derives values that lie right under the other values of its own layer.
    Raises ConfigError, one line, with the nearest known name for a typo.
    """
    parser = build_parser(prog)
    known = _known_keys()
    _check_flags(argv, parser, known)
    words = _with_brackets(argv, _list_keys())
    given = _parse(parser, lambda: parser.parse_args(words, defaults=False), "command line")
    if given.get("minutes") is not None and not given.get("input"):
        raise ConfigError("--minutes: goes with --input PATH; without it write --train.steps N")
    layers: list[tuple[str, dict[str, Any]]] = []
    if given.get("preset") is not None:
        name = given["preset"]
        layers.append((f"preset {name}", _typed(parser, _preset_values(name), f"preset {name}", known)))
    for path in given.get("config") or ():
        layers.append((path, _typed(parser, _file_values(path), path, known)))
    layers.append(("command line", _flatten(given)))
    start = next((layer[_INIT_FROM] for _, layer in reversed(layers) if _INIT_FROM in layer), None)
    if start == "":
        raise ConfigError("--checkpoint.init_from '': is empty; give the folder of a model, for example RUN/model")
    if start is not None:
        layers.insert(0 if given.get("preset") is None else 1, (start, _starting_values(start)))
    return _merge(parser, layers, given)


def _merge(parser: ArgumentParser, layers: list[tuple[str, dict]], given: Namespace) -> ParsedArguments:
    values = {key: value for key, value in _flatten(parser.get_defaults()).items() if "." in key}
    sources = dict.fromkeys(values, "default")
    depth = None
    for source, layer in layers:
        if layer.get(_DEPTH) is not None:
            depth = layer[_DEPTH]
            derived = derive_from_depth(depth)
            if "model.block_pattern" not in layer:
                derived["model.block_pattern"] = None
            values.update(derived)
            sources.update(dict.fromkeys(derived, f"--depth {depth}"))
        for key, value in layer.items():
            if "." in key:
                values[key] = value
                sources[key] = source
    if given.get("resume") is not None:
        values["checkpoint.resume"], sources["checkpoint.resume"] = given["resume"], "command line"
    config = _instantiate(values)
    config.check()
    derived = {key: values[key] for key in sources if sources[key].startswith("--depth ") and key in REASONS}
    return ParsedArguments(
        config=config,
        sources=sources,
        deepspeed_config=given.get("deepspeed_config"),
        print_config=bool(given.get("print_config")),
        summary=bool(given.get("summary")),
        depth=depth,
        derived=derived,
        inputs=list(given.get("input") or ()),
        minutes=10.0 if given.get("minutes") is None else given["minutes"],
        has_preset=given.get("preset") is not None,
    )


def _known_keys() -> list[str]:
    keys = []
    for name, section in get_type_hints(AdambaConfig).items():
        keys += [f"{name}.{entry.name}" for entry in dataclasses.fields(section)]
    return keys


def _list_keys() -> list[str]:
    """Keys that take a list and no bare text."""
    keys = []
    for section, kind in get_type_hints(AdambaConfig).items():
        for name, hint in get_type_hints(kind).items():
            kinds = [get_origin(kind) or kind for kind in (get_args(hint) if type(None) in get_args(hint) else (hint,))]
            if list in kinds and str not in kinds:
                keys.append(f"{section}.{name}")
    return keys


def _with_brackets(argv: Sequence[str], list_keys: Sequence[str]) -> list[str]:
    """The words, with `--train.freeze a,b` as `--train.freeze [a,b]`, which is what the parser reads as a list."""
    flags = {f"--{key}" for key in list_keys}
    bare = lambda text: not text.startswith(("[", "--")) and text != "null"
    words: list[str] = []
    for word in argv:
        name, equals, value = word.partition("=")
        if equals and name in flags and bare(value):
            word = f"{name}=[{value}]"
        elif words and words[-1] in flags and bare(word):
            word = f"[{word}]"
        words.append(word)
    return words


def _check_flags(argv: Sequence[str], parser: ArgumentParser, known: list[str]) -> None:
    """Typos first: the parser's own message for them is long and names no neighbour."""
    flags = {option for action in parser._actions for option in action.option_strings} | {f"--{key}" for key in known}
    sections = {section.name for section in dataclasses.fields(AdambaConfig)}
    for word in argv:
        if word.count("[") + word.count("{") > _DEEPEST:
            raise ConfigError(
                f"{word[:40]}...: has more than {_DEEPEST} brackets; write the values into a --config file"
            )
        name = word.split("=", 1)[0]
        if not name.startswith("--") or name in flags:
            continue
        if name.removeprefix("--").split(".")[0] in sections and name.startswith(("--model.modes.", "--model.nest.")):
            continue
        if told := peer_hint(name):
            raise ConfigError(f"{name}: {told}")
        near = nearest(name, flags)
        raise ConfigError(
            f"{name}: unknown flag; did you mean {near}?" if near else f"{name}: unknown flag; see --help"
        )


def _parse(parser: ArgumentParser, call: Any, source: str) -> Namespace:
    try:
        return call()
    except (ArgumentError, TypeError, ValueError, KeyError) as error:
        text = " ".join(str(error).replace("\n", " ").split())
        text = text.replace('Parser key "', "--").replace('":', ":")
        raise ConfigError(f"{source}: {text}; see --help for what each flag takes") from None


def _preset_values(name: str) -> dict[str, Any]:
    if name not in preset_names():
        near = nearest(name, preset_names()) or preset_names()[0]
        raise ConfigError(f"--preset {name}: unknown; did you mean {near}? (presets: {', '.join(preset_names())})")
    text = importlib.resources.files("megatron_adamba.config").joinpath("presets", f"{name}.yaml").read_text()
    return yaml.safe_load(text) or {}


def _file_values(path: str) -> dict[str, Any]:
    content = read_regular(Path(path), ConfigError, "give a YAML file; --print_config prints one", flag="--config")
    try:
        values = yaml.load(content, _OnceLoader)
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"--config {path}: not YAML ({text})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: must hold sections such as `model:`, as the presets do")
    return values


class _OnceLoader(yaml.SafeLoader):
    """YAML's loader, which lets the last of several equal keys win, but for those."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Raises ConfigError."""
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                name = key.value[:100]
                raise ConfigError(f"{name} is given twice, in lines {lines[key.value]} and {line}; write it once")
            lines[key.value] = line
        return super().construct_mapping(node, deep)


def _starting_values(folder: str) -> dict[str, Any]:
    """Model and tokenizer of a canonical checkpoint, and what its gates were trained for, flat."""
    model = read_model_config(folder)
    values = {f"model.{entry.name}": getattr(model, entry.name) for entry in dataclasses.fields(model)}
    tokenizer = find_tokenizer(Path(folder))
    values |= {} if tokenizer is None else {"data.tokenizer": tokenizer}
    if model.gate_size:
        run = read_run_config(folder)
        for name in _OF_GATES:
            section, _, key = name.partition(".")
            kept = run.get(section)
            value = kept.get(key) if isinstance(kept, dict) else None
            if value not in (None, "none"):
                values[name] = value
    return values


def _typed(parser: ArgumentParser, values: dict[str, Any], source: str, known: list[str]) -> dict[str, Any]:
    """Check names and types of a YAML layer and flatten it."""
    sections = {section.name for section in dataclasses.fields(AdambaConfig)}
    for name, section in values.items():
        if name != _DEPTH and name not in sections:
            near = nearest(str(name), [*sections, _DEPTH])
            raise ConfigError(f"{source}: unknown section {name!r}" + (f"; did you mean {near}?" if near else ""))
        if name in sections:
            if section is not None and not isinstance(section, dict):
                raise ConfigError(f"{source}: section {name} holds {section!r}; write `{name}:` and its keys below")
            for key in section or {}:
                if f"{name}.{key}" not in known:
                    near = nearest(f"{name}.{key}", known)
                    raise ConfigError(
                        f"{source}: unknown key {name}.{key}" + (f"; did you mean {near}?" if near else "")
                    )
    body = {name: section for name, section in values.items() if section is not None}
    return _flatten(_parse(parser, lambda: parser.parse_object(body, defaults=False), source))


def _flatten(namespace: Namespace) -> dict[str, Any]:
    """`{"model.hidden_size": ..., "depth": ...}`: sections by their fields, the rest as it is."""
    flat: dict[str, Any] = {}
    sections = {section.name for section in dataclasses.fields(AdambaConfig)}
    for name, value in vars(namespace).items():
        if name in sections:
            if value is not None:
                flat.update({f"{name}.{key}": inner for key, inner in vars(value).items()})
        else:
            flat[name] = value
    return flat


def _instantiate(values: dict[str, Any]) -> AdambaConfig:
    sections = {}
    for section, kind in get_type_hints(AdambaConfig).items():
        prefix = section + "."
        fields = {key.removeprefix(prefix): _plain(value) for key, value in values.items() if key.startswith(prefix)}
        for place, row_kind in _ROWS.items():
            owner, _, key = place.partition(".")
            if section == owner and fields.get(key) is not None:
                fields[key] = [row if isinstance(row, row_kind) else row_kind(**row) for row in fields[key]]
        if section == "data":
            # the weights of a blend are numbers to the parser and words to whoever reads the list
            for key in ("train", "validation"):
                fields[key] = [str(item) for item in fields[key]]
        sections[section] = kind(**fields)
    return AdambaConfig(**sections)


def _plain(value: Any) -> Any:
    """Namespaces that the parser makes of nested values, back to dicts and lists."""
    if isinstance(value, Namespace):
        return value.as_dict()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value
