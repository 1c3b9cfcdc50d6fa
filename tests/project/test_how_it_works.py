"""docs/how_it_works.md names files and functions that exist."""

import ast
import re
from pathlib import Path

import pytest

import elip_models

ROOT = Path(elip_models.__file__).parents[1]
PAGE = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
CALLS = re.findall(r"^ *(\S+\.py) +([\w.]+)", PAGE, re.MULTILINE)
FILES = re.findall(r"^\| `(\S+\.py)` \|", PAGE, re.MULTILINE)


def located(name):
    """Return the path of a file that the page names."""
    return ROOT / name if name.startswith("elip_kernels/") else ROOT / "elip_models" / name


def definitions(path):
    """Return the names of the functions and classes of a file, and of the classes' methods."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    top = [node for node in ast.parse(path.read_text()).body if isinstance(node, kinds)]
    inner = [(c, node) for c in top for node in c.body if isinstance(node, kinds)]
    return {node.name for node in top} | {f"{c.name}.{node.name}" for c, node in inner}


@pytest.mark.parametrize(("file", "name"), CALLS, ids=lambda each: each)
def test_each_function_on_the_page_exists(file, name):
    assert name in definitions(located(file))


def test_each_file_on_the_page_exists():
    assert FILES and [name for name in FILES if not located(name).is_file()] == []
