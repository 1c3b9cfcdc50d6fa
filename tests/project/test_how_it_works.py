"""docs/how_it_works.md names functions that exist, and the files that a call runs through."""

import ast
import re
import sys
from pathlib import Path

import pytest

import elip_models
from tests.helpers.towers import SCHEDULE, images, plain_vit

ROOT = Path(elip_models.__file__).parents[1]
PAGE = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
CALLS = re.findall(r"^ *(\S+\.py) +([\w.]+)", PAGE, re.MULTILINE)
ROWS = re.findall(r"^\| `(\S+\.py)` \| .* \| (yes|no) \| (yes|no) \|$", PAGE, re.MULTILINE)
STRATEGIES = {"tome": {}, "elip": {"schedule": SCHEDULE, "scorer": "last"}}


def located(name):
    """Return the path of a file that the page names."""
    return ROOT / name if name.startswith("elip_kernels/") else ROOT / "elip_models" / name


def definitions(path):
    """Return the names of the functions and classes of a file, and of the classes' methods."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    top = [node for node in ast.parse(path.read_text()).body if isinstance(node, kinds)]
    inner = [(c, node) for c in top for node in c.body if isinstance(node, kinds)]
    return {node.name for node in top} | {f"{c.name}.{node.name}" for c, node in inner}


def traced(call):
    """Return the files of this project that `call` runs through, up to the ops."""
    found = set()

    def file_of(frame):
        path = Path(frame.f_code.co_filename)
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else ""

    def caller_of(frame):
        frame = frame.f_back
        while frame is not None and not file_of(frame).startswith("elip_"):
            frame = frame.f_back
        return "" if frame is None else file_of(frame)

    def profile(frame, event, _):
        if event == "call":
            file = file_of(frame)
            is_op = file.startswith("elip_kernels/") and caller_of(frame).startswith("elip_models/")
            if file.startswith("elip_models/") or is_op:
                found.add(file)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize(("file", "name"), CALLS, ids=lambda each: each)
def test_each_function_on_the_page_exists(file, name):
    assert name in definitions(located(file))


def test_the_page_has_its_three_diagrams_and_its_table():
    assert PAGE.count("```text") == 4
    assert len(CALLS) > 30 and len(ROWS) > 10


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_call_runs_through_the_files_of_the_page(name):
    column = 1 + list(STRATEGIES).index(name)
    expected = {str(located(row[0]).relative_to(ROOT)) for row in ROWS if row[column] == "yes"}
    model, x = plain_vit(), images()
    elip_models.reduce_(model, strategy=name, **STRATEGIES[name])
    model(x)
    assert traced(lambda: model(x)) == expected
