"""The rooms of the house: imports point one way, files and functions are short."""

import ast
from pathlib import Path

import pytest

import elip_kernels
import elip_models

ROOTS = [Path(package.__file__).parent for package in (elip_kernels, elip_models)]
FLOORS = (
    ("elip_kernels", "elip_models.validation", "elip_models.validation"),
    ("elip_models.reduction.schedule",),
    ("elip_models.data",),
    ("elip_models.towers",),
    ("elip_models.reduction",),
    ("elip_models.models",),
    ("elip_models.checkpoints", "elip_models.tasks"),
    ("elip_models.profiling",),
    ("elip_models.analysis",),
    ("elip_models.training",),
    ("benchmarks.studies",),
    ("elip_models.commands",),
    ("elip_models", "elip_models.cli"),
)
"""From the ground up; a module is on the floor of its longest name here."""


def _name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _floor(name: str) -> tuple[int, str]:
    """The floor of a module, and its room there."""
    rooms = [(len(room), floor, room) for floor, rooms in enumerate(FLOORS) for room in rooms]
    fits = [each for each in rooms if name == each[2] or name.startswith(f"{each[2]}.")]
    _, floor, room = max(fits)
    return floor, room


def _imported(path: Path, *, for_types: bool = True) -> set[str]:
    """The modules of this project that a file imports, anywhere in it; for types alone too."""
    names, tree = set(), ast.parse(path.read_text(encoding="utf-8"))
    blocks = (node for node in ast.walk(tree) if isinstance(node, ast.If))
    typing = {id(line) for b in blocks if "TYPE_CHECKING" in ast.dump(b.test) for line in b.body}
    for node in ast.walk(tree):
        if id(node) in typing and not for_types:
            continue
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


def test_no_two_modules_import_each_other():
    imports = {name: _imported(path, for_types=False) for name, path in MODULES.items()}
    both = {(a, b) for a in imports for b in imports[a] if a < b and a in imports.get(b, ())}
    assert not both


def test_the_root_has_the_ground_floor_and_the_commands_alone():
    names = {path.stem for path in ROOTS[1].glob("*.py")}
    assert names == {"__init__", "validation", "cli", "open_clip_train"}


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short(module):
    text = MODULES[module].read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{module}.{node.name}"
