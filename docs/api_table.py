"""Write the tables of public names in docs/api: every name of `__all__`, and what it is.

python docs/api_table.py             # rewrite the block between the two markers of each page
python docs/api_table.py --check     # exit status 1 if a table is stale

Names are in the order of the page. The description is the first line of a name's docstring.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.marked_block import Block, run

FOLDER = Path(__file__).parent / "api"
PAGES = {"kernels.md": "elip_kernels", "models.md": "elip_models"}
CONSTANTS = {
    "LANGUAGE_STRATEGIES": "The strategies of a multimodal language model by name.",
    "__version__": "The version of the package.",
    "STRATEGIES": "The strategies by name; add a class to give it a name.",
}


def kind_of(value: Any) -> str:
    """Return what a name is: class, function, warning or constant."""
    if not inspect.isclass(value):
        return "function" if callable(value) else "constant"
    return "warning" if issubclass(value, Warning) else "class"


def description(name: str, value: Any) -> str:
    """Return the first line of the docstring, as one cell of a table.

    Raises:
        ValueError: the name has no docstring of its own.
    """
    if name in CONSTANTS:
        return CONSTANTS[name]
    text = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
    if not text:
        raise ValueError(f"{name}: expected a docstring, got none")
    return inspect.cleandoc(text).partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")


def in_order(names: list[str], page: Path) -> list[str]:
    """Return the names in the order in which the page documents them, the others last."""
    entries = re.findall(r"^::: \S+\.(\w+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return sorted(names, key=lambda name: (*entries, name).index(name))


def link(folder: Path, file: str, entry: str) -> str:
    """Return the name of an entry, as a link to the page that documents it.

    Raises:
        ValueError: no page documents it under its public name.
    """
    name = entry.rpartition(".")[2]
    if name in CONSTANTS:
        return f"`{name}`"
    for path in sorted(folder.glob("*.md"), key=lambda path: path.name != file):
        if f"::: {entry}\n" in path.read_text(encoding="utf-8"):
            return f"[`{name}`]({'' if path.name == file else path.name}#{entry})"
    raise ValueError(f"{folder}: expected the line '::: {entry}' in a page, got none")


def table(package: ModuleType, folder: Path, file: str) -> str:
    """Return the table of a package, for the page `file`."""
    lines = ["| name | kind | description |", "| --- | --- | --- |"]
    for name in in_order(package.__all__, folder / file):
        value = getattr(package, name)
        linked = link(folder, file, f"{package.__name__}.{name}")
        lines.append(f"| {linked} | {kind_of(value)} | {description(name, value)} |")
    return "\n".join(lines)


def blocks() -> Iterator[Block]:
    """Yield the table of each package."""
    for file, package in PAGES.items():
        yield Block(FOLDER / file, "names", table(importlib.import_module(package), FOLDER, file))


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if a page has no markers, or is stale under --check."""
    return run(blocks, "python docs/api_table.py", __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
