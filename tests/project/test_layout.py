"""The layout of the packages: imports point one way, files and functions are short."""

import ast
from functools import cache
from pathlib import Path

import pytest

import elip_kernels
import elip_models

ROOTS = [Path(package.__file__).parent for package in (elip_kernels, elip_models)]
FLOORS = (
    ("elip_kernels", "elip_models.validation", "elip_models.validation"),
    ("elip_models.reduction.schedule",),
    ("elip_models.pretraining.data",),
    ("elip_models.towers",),
    ("elip_models.reduction",),
    ("elip_models.vlm",),
    ("elip_models.pretraining.models",),
    ("elip_models.pretraining.checkpoints", "elip_models.pretraining.tasks"),
    ("elip_models.profiling",),
    ("elip_models.analysis",),
    ("elip_models.embedding",),
    ("elip_models.pretraining.training",),
    ("benchmarks.studies",),
    ("elip_models.commands",),
    ("elip_models", "elip_models.cli"),
    ("elip_models.__main__",),
)
"""The order of imports, lowest first; a module belongs to the longest matching name."""


def _name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _floor(name: str) -> tuple[int, str]:
    """Return the floor of a module, and its package there."""
    rooms = [(len(room), floor, room) for floor, rooms in enumerate(FLOORS) for room in rooms]
    fits = [each for each in rooms if name == each[2] or name.startswith(f"{each[2]}.")]
    _, floor, room = max(fits)
    return floor, room


@cache
def _nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@cache
def _imported(path: Path) -> set[str]:
    """Return the modules of this project that a file imports, anywhere in it, for types too."""
    names = set()
    for node in _nodes(path):
        if isinstance(node, ast.ImportFrom) and node.module:
            found = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {each if each in MODULES else node.module for each in found}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] in ("elip_kernels", "elip_models")}


MODULES = {
    _name(path.relative_to(root.parent)): path
    for root in ROOTS
    for path in sorted(root.rglob("*.py"))
}


@pytest.mark.parametrize("module", MODULES)
def test_imports_never_point_upward(module):
    floor, room = _floor(module)
    for name in _imported(MODULES[module]):
        below, other = _floor(name)
        assert below < floor or other == room, f"{module} imports {name}"


def _circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Return a circle through each module that imports itself through others, by its first name."""
    found = {}
    for start in imports:
        paths = [[start]]
        reached = {start}
        for path in paths:
            for name in sorted(imports.get(path[-1], ())):
                if name == start:
                    found.setdefault(frozenset(path), path)
                elif name not in reached:
                    reached.add(name)
                    paths.append([*path, name])
    return list(found.values())


def test_no_two_modules_import_each_other():
    assert not _circles({name: _imported(path) for name, path in MODULES.items()})


def test_circles_of_any_length_are_found():
    imports = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"f"}, "f": {"e"}}
    assert [sorted(circle) for circle in _circles(imports)] == [["a", "b", "c"], ["e", "f"]]


def test_the_root_has_the_ground_floor_and_the_commands_alone():
    names = {path.stem for path in ROOTS[1].glob("*.py")}
    assert names == {"__init__", "__main__", "validation", "cli", "open_clip_train"}


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short(module):
    text = MODULES[module].read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for node in _nodes(MODULES[module]):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{module}.{node.name}"
