"""Pages agree with the code: extras, names and files."""

import ast
import re
import tomllib
from functools import cache
from pkgutil import resolve_name

import pytest

from elip_models.cli import COMMANDS
from elip_models.validation import EXTRAS
from tests.project.test_docs import PAGES, ROOT
from tests.project.test_layout import MODULES

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def spans(page):
    """Return the inline code of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def requirements(extra):
    """Return what an extra lists: other extras of this package, and distributions."""
    names = set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        own = re.match(r"elip-kernels\[(.*)\]$", requirement)
        names |= set(own[1].split(",")) if own else {re.match(r"[\w.-]+(\[\w+\])?", requirement)[0]}
    return names


def installed(extra):
    """Return an extra and the extras that it contains."""
    inner = requirements(extra) & PROJECT["optional-dependencies"].keys() - {extra}
    return {extra}.union(*map(installed, inner))


@cache
def imports(path, inside_functions=False):
    """Return the names that a file imports when it is imported, or also when its functions run."""
    names, nodes = set(), [ast.parse(path.read_text(encoding="utf-8"))]
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        elif inside_functions or not isinstance(node, ast.FunctionDef):
            nodes += ast.iter_child_nodes(node)
    return names


@cache
def needed(command):
    """Return the extras of all packages that a command of `elip` imports."""
    module = f"elip_models.commands.{COMMANDS[command][0].partition('.')[0]}"
    names = [*imports(MODULES[module], inside_functions=True)]
    for name in names:
        if name in MODULES:
            names += imports(MODULES[name]) - set(names)
    return {EXTRAS[top] for name in names if (top := name.partition(".")[0]) in EXTRAS}


STEP = re.compile(
    r'install -e "\.\[([\w,-]+)\]"|(?:^elip|&& elip|-m elip_models\.cli) (\w+)', re.MULTILINE
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_extras_that_a_page_installs_have_what_its_commands_import(page):
    extras, missing = set(), {}
    for installs, command in STEP.findall(page.read_text()):
        extras |= set().union(*map(installed, installs.split(","))) if installs else set()
        if extras and command and not needed(command) <= extras:
            missing[command] = needed(command) - extras
    assert not missing


def test_the_table_of_extras_is_that_of_the_package():
    rows = re.findall(
        r"^\| `([\w-]+)` \| .* \| (.*) \|$", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE
    )
    of_development = {"bench", "test", "vllm-test", "docs"}
    assert {extra: {name.strip("` ") for name in names.split(",")} for extra, names in rows} == {
        extra: requirements(extra)
        for extra in PROJECT["optional-dependencies"].keys() - of_development
    }


def test_each_name_and_file_in_the_text_of_a_page_exists():
    missing = []
    for page in PAGES:
        for code in spans(page):
            for name in re.findall(r"\belip_(?:models|kernels)(?:\.\w+)+", code):
                try:
                    resolve_name(name)
                except (ImportError, AttributeError):
                    missing.append((page.name, name))
            for name in re.findall(r"^(?:tests|benchmarks|docs|examples)/[\w/]+\.\w+", code):
                if not (ROOT / name).exists():
                    missing.append((page.name, name))
    assert missing == []
