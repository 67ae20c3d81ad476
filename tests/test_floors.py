"""The rooms of the package and the floors they stand on, read from the source itself."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "megatron_adamba"
FLOORS = (
    {"errors"},
    {"files", "schema"},
    {"config"},
    {"blueprint"},
    {"elastic", "parallel", "ops"},
    {"checkpoint", "data"},
    {"layers"},
    {"model"},
    {"ledger"},
    {"planner"},
    {"engine"},
    {"evaluation"},
    {"training", "inference", "surgery"},
    {"commands", "api"},
    {"__main__"},
)
"""lowest first; rooms on one floor do not import each other"""
OWNERS = {"deepspeed": "engine", "mamba_ssm": "ops", "causal_conv1d": "ops", "transformer_engine": "ops"}
"""libraries that one room alone may import"""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, Path]:
    return {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def imported(path: Path, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, those inside functions and those by a constant name among them."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides the room it reaches into"
            for alias in node.names:
                # `from a import b` may name a file of a or something inside it
                full = f"{node.module}.{alias.name}"
                yield node.lineno, full if full in known else node.module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called.endswith("import_module") or called == "__import__":
                yield node.lineno, str(node.args[0].value)


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


@functools.cache
def all_imports() -> list[tuple[str, int, str]]:
    """(importing module, line, imported name) over the whole package."""
    files = sources()
    return [(module, line, name) for module, path in files.items() for line, name in imported(path, set(files))]


def test_every_room_has_a_floor():
    rooms = {room for module in sources() if (room := room_of(module))}
    assert rooms <= set().union(*FLOORS)


def test_a_room_imports_only_what_lies_below_it():
    level = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
    wrong = []
    for module, line, name in all_imports():
        here, there = room_of(module), room_of(name)
        if module == PACKAGE:
            continue  # the front of the house shows what is on the top floor
        if there is not None and there != here and level[there] >= level[here]:
            wrong.append(f"{module}:{line} ({here}, floor {level[here]}) imports {name} (floor {level[there]})")
    assert not wrong, "\n".join(wrong)


def test_files_inside_a_room_import_without_cycles():
    files = set(sources())
    graph = {module: set() for module in files}
    for module, _, name in all_imports():
        if name in files and name != module:
            graph[module].add(name)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_nothing_imports_the_scripts_or_the_tests():
    wrong = [(m, line, name) for m, line, name in all_imports() if name.split(".")[0] in {"tools", "tests"}]
    assert not wrong and not [name for _, _, name in all_imports() if name.startswith("pretrain_adamba")]


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_with_one_owner_is_imported_there_alone(library):
    """An import may go by a name kept in a table, so a string that spells a module of the library counts too."""
    spelled = re.compile(rf"{library}(\.\w+)*")
    scripts = {str(path): path for path in [*(ROOT / "tools").glob("*.py"), ROOT / "pretrain_adamba.py"]}
    places = set()
    for module, path in {**sources(), **scripts}.items():
        if module.startswith(f"{PACKAGE}.commands.benchmarks."):
            continue  # they call the peers that they measure
        names = {name for _, name in imported(path, set())}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
        if any(spelled.fullmatch(name) for name in names):
            places.add(room_of(module) or module)
    assert places <= {OWNERS[library]}
    assert places or library == "transformer_engine"  # the check must see what it is about


def test_packaging_needs_nothing_but_the_standard_library_and_setuptools():
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert [re.match(r"[\w.-]+", name)[0] for name in asked] == ["setuptools"] and not (ROOT / "setup.py").exists()


def test_the_lower_floors_know_nothing_of_torch():
    """The command line answers --help and refuses typos before anything heavy is loaded."""
    low = {"errors", "files", "config", "blueprint"}
    wrong = [(m, line, name) for m, line, name in all_imports() if room_of(m) in low and name.split(".")[0] == "torch"]
    assert not wrong


def test_everything_imports_without_a_gpu_and_without_deepspeed_or_kernels():
    program = (
        "import importlib, json, sys\n"
        "for name in json.loads(sys.argv[1]): importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, json.dumps(list(sources()))],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    loaded = set(json.loads(result.stdout.splitlines()[-1]))
    assert PACKAGE in loaded and not loaded & set(OWNERS)
