"""docs/how_it_works.md names files and functions that exist, and the files that run."""

import ast
import re
import sys
from pathlib import Path

import pytest
import timm
import torch

import elip_models

ROOT = Path(elip_models.__file__).parents[1]
PAGE = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
CALLS = re.findall(r"^ *(\S+\.py) +([\w.]+)", PAGE, re.MULTILINE)
FILES = re.findall(r"^\| `(\S+\.py)` \|", PAGE, re.MULTILINE)
LIMITS = re.findall(r"`(\w+)` runs at most (\d+)\s+files with ([\d,]+) lines", PAGE)


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
    assert {name for name, *_ in LIMITS} == {"merge", "elip"}
    assert FILES and [name for name in FILES if not located(name).is_file()] == []


def files_that_run(call):
    """Return the files of `elip_models` with a function that `call()` runs."""
    package, files = Path(elip_models.__file__).parent, set()

    def note(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(package):
            files.add(path.relative_to(package).as_posix())

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return files


@pytest.mark.parametrize(("column", "strategy"), [(2, "merge"), (3, "elip")])
def test_the_table_has_the_files_that_a_forward_pass_runs(column, strategy):
    rows = [line.strip("|").split(" | ") for line in PAGE.splitlines() if ".py` |" in line]
    listed = {row[0].strip(" `") for row in rows if row[column].strip() == "yes"}
    model = elip_models.reduce_(timm.create_model("vit_tiny_patch16_224", img_size=64), strategy)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        model.eval()(images)  # the first pass also computes what later ones read
        assert files_that_run(lambda: model(images)) == {
            name for name in listed if not name.startswith("elip_kernels/")
        }


@pytest.mark.parametrize(("strategy", "files", "lines"), LIMITS, ids=lambda each: each)
def test_a_forward_pass_is_no_longer_than_the_page_says(strategy, files, lines):
    column = 2 if strategy == "merge" else 3
    rows = [line.strip("|").split(" | ") for line in PAGE.splitlines() if ".py` |" in line]
    names = [row[0].strip(" `") for row in rows if row[column].strip(" |") == "yes"]
    paths = [located(name) for name in names if not name.startswith("elip_kernels/")]
    assert len(paths) <= int(files)
    total = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
    assert total <= int(lines.replace(",", ""))
