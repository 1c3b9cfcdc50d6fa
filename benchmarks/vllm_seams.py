"""Which names of the vLLM plugin exist in other versions of vLLM, by their source alone.

pip download --no-deps --only-binary :all: vllm==0.34.0
python -m benchmarks.vllm_seams vllm-0.34.0*.whl       # a wheel, or a folder with the package

Nothing of vLLM is imported. A name counts as present if its module defines or imports it; a method,
if its class or a base class defines it.
"""

import ast
import sys
import zipfile
from argparse import ArgumentParser
from pathlib import Path

from benchmarks.tables import table
from elip_models.integrations.vllm.families import FAMILIES
from elip_models.integrations.vllm.seams import HOOKS, PATCH_SEAMS, SEAMS

HEADER = ("version", "models with every name", "the same for dedup", "missing names")
Source = Path | zipfile.Path


def missing_in(root: Source, names: tuple[str, ...]) -> list[str]:
    """Return the names, each "module:attribute", that the package below `root` does not have."""
    return [name for name in names if not _has(root, *name.split(":"))]


def _has(root: Source, module: str, name: str) -> bool:
    owner, _, method = name.partition(".")
    found = _definition(root, module, owner)
    return found is not None and (not method or _defines(root, *found, method))


def _tree(root: Source, module: str) -> ast.Module | None:
    path = root.joinpath(*module.split("."))
    for file in (path / "__init__.py", path.parent / f"{path.name}.py"):
        if file.exists():
            return ast.parse(file.read_text(encoding="utf-8"))
    return None


def _definition(root: Source, module: str, name: str) -> tuple[str, ast.AST] | None:
    """Return the module that defines a name, and its class or the value that it gets."""
    tree = _tree(root, module)
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return module, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definition(root, _origin(root, module, node), alias.name)
    return None


def _origin(root: Source, module: str, node: ast.ImportFrom) -> str:
    """Return the absolute name of the module of an import."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    is_package = root.joinpath(*parts, "__init__.py").exists()
    base = parts[: len(parts) - node.level + is_package]
    return ".".join([*base, *filter(None, [node.module])])


def _defines(root: Source, module: str, node: ast.AST, method: str) -> bool:
    """Return whether a class, the class of an instance, or a base class defines a method."""
    if isinstance(node, ast.Assign | ast.AnnAssign):
        bases = [node.value.func] if isinstance(node.value, ast.Call) else []
    elif isinstance(node, ast.ClassDef):
        if any(getattr(part, "name", None) == method for part in node.body):
            return True
        bases = node.bases
    else:
        return False
    for base in bases:
        base = base.value if isinstance(base, ast.Subscript) else base  # a generic class
        if isinstance(base, ast.Name):
            found = _definition(root, module, base.id)
            if found is not None and found[1] is not node and _defines(root, *found, method):
                return True
    return False


def main() -> None:
    """Print a row for each version."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", type=Path, help="wheels, or folders with vllm/")
    rows = []
    for path in parser.parse_args().sources:
        root = zipfile.Path(path) if path.is_file() else path
        common = missing_in(root, (*HOOKS, *SEAMS))
        families = [missing_in(root, family.seams) for family in FAMILIES.values()]
        towers = [family for family in FAMILIES.values() if family.tower is not None]
        patches = [missing_in(root, (*PATCH_SEAMS, *family.patch_seams)) for family in towers]
        names = dict.fromkeys(sum([*families, *patches], common))
        rows.append(
            [path.name, _complete(families), _complete(patches), ", ".join(names) or "none"]
        )
    sys.stdout.write(table(HEADER, rows, left=4) + "\n")


def _complete(models: list[list[str]]) -> str:
    """Return how many models lack no name."""
    return f"{sum(not missing for missing in models)} of {len(models)}"


if __name__ == "__main__":
    main()
