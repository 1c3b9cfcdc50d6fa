"""The layout of the packages: imports point one way, and never to what is not in the wheel."""

import ast
from functools import cache
from pathlib import Path

import elip_kernels
import elip_models

ROOTS = [Path(package.__file__).parent for package in (elip_kernels, elip_models)]
FLOORS = (
    ("elip_kernels",),
    ("elip_models.validation",),
    (
        "elip_models.call_context",
        "elip_models.images",
        "elip_models.intervals",
        "elip_models.rank_barrier",
    ),
    ("elip_models.user_warnings",),
    ("elip_models.towers",),
    ("elip_models.strategies",),
    ("elip_models.engine",),
    ("elip_models.vlm",),
    ("elip_models.api",),
    ("elip_models.saving",),
    ("elip_models.profiling",),
    ("elip_models.analysis",),
    ("elip_models.recovery", "elip_models.integrations"),
    ("elip_models.calibration",),
    ("elip_models.pretraining.data",),
    ("elip_models.pretraining.models",),
    ("elip_models.pretraining.checkpoints", "elip_models.pretraining.tasks"),
    ("elip_models.pretraining.training",),
    ("elip_models.pretraining",),
    ("elip_models.embedding",),
    ("elip_models.commands",),
    ("elip_models", "elip_models.cli", "elip_models.open_clip_train"),
    ("elip_models.__main__",),
)
"""The order of imports, lowest first; a module belongs to the longest matching name."""
OUTSIDE = ("benchmarks", "docs", "tests")
"""Folders of a checkout that are not in the wheel."""


def _name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _floor(name: str) -> tuple[int, str]:
    """Return the floor of a module, and the name that it belongs to there."""
    prefixes = [
        (len(prefix), floor, prefix)
        for floor, prefixes in enumerate(FLOORS)
        for prefix in prefixes
        if name == prefix or name.startswith(f"{prefix}.")
    ]
    _, floor, prefix = max(prefixes)
    return floor, prefix


@cache
def _imported(path: Path) -> set[str]:
    """Return the modules that a file imports, anywhere in it, for types too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {member if member in MODULES else node.module for member in members}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def _of_project(path: Path) -> set[str]:
    roots = ("elip_kernels", "elip_models")
    return {name for name in _imported(path) if name.partition(".")[0] in roots}


MODULES = {
    _name(path.relative_to(root.parent)): path
    for root in ROOTS
    for path in sorted(root.rglob("*.py"))
}


def test_imports_never_point_upward():
    upward = []
    for module, path in MODULES.items():
        floor, prefix = _floor(module)
        for name in _of_project(path):
            floor_below, other = _floor(name)
            if floor_below >= floor and other != prefix:
                upward.append(f"{module} imports {name}")
    assert upward == []


def test_the_packages_import_nothing_that_is_not_in_the_wheel():
    outside = {
        (module, name)
        for module, path in MODULES.items()
        for name in _imported(path)
        if name.partition(".")[0] in OUTSIDE
    }
    assert not outside
