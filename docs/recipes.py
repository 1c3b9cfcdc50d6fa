"""Write the tables of docs/original_recipes.md: our value, the original value, its source.

python docs/recipes.py             # rewrite the block between the two markers
python docs/recipes.py --check     # exit status 1 if the block is stale

The original values are in docs/originals.yaml; ours are read from the recipes.
"""

import argparse
import re
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from elip_models.models.registry import create_model
from elip_models.training.recipe import load_recipe

FOLDER = Path(__file__).parent
PAGE = FOLDER / "original_recipes.md"
BEGIN, END = "<!-- recipes:begin -->", "<!-- recipes:end -->"


def read_originals() -> dict[str, Any]:
    """Return the tables by recipe, and under 'beyond' the differences that no key describes."""
    return yaml.safe_load((FOLDER / "originals.yaml").read_text(encoding="utf-8"))


@cache
def ours(recipe: str) -> dict[str, Any]:
    """Return the values of a recipe by dotted key, and its model's config under 'config.'."""
    config = load_recipe(recipe, ["data.train=a.json"])
    inputs = {"captions": config.data.captions, "resize": config.data.resize}
    with torch.device("meta"):
        model = create_model(config.model.name, **inputs | config.model.overrides)
    values: dict[str, Any] = {"seed": config.seed}
    for section in ("model", "data", "optim"):
        values |= {f"{section}.{k}": v for k, v in asdict(getattr(config, section)).items()}
    return values | {f"config.{name}": value for name, value in asdict(model.config).items()}


def is_same(value: Any, original: Any) -> bool:
    """Return whether two values are equal; YAML has lists where recipes have tuples."""
    return (list(value) if isinstance(value, tuple) else value) == original


def block() -> str:
    """Return the tables, and the differences that no key describes."""
    originals = read_originals()
    beyond = originals.pop("beyond")
    lines = []
    for recipe, rows in originals.items():
        lines += [
            "",
            f"### `{recipe}`",
            "",
            _row("key", "ours", "original", "source", "difference"),
        ]
        lines.append("| --- " * 5 + "|")
        values = ours(recipe)
        for key, row in rows.items():
            same = "same" if "same" not in row else f"same: {row['same']}"
            texts = _shown(values[key]), _shown(row["original"]), row["source"]
            lines.append(
                _row(
                    f"`{key}`",
                    *texts,
                    f"**{row.get('difference', '')}**" if "difference" in row else same,
                )
            )
    lines += ["", "### Beyond the keys", "", _row("recipes", "what", "ours", "original", "source")]
    lines.append("| --- " * 5 + "|")
    for row in beyond:
        names = ", ".join(f"`{name}`" for name in row["recipes"])
        lines.append(_row(names, row["what"], row["ours"], row["original"], row["source"]))
    return "\n".join(lines).strip()


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _shown(value: Any) -> str:
    """Return a value as YAML writes it; text with spaces stays as it is."""
    if isinstance(value, str) and " " in value and "(" not in value:
        return value
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=1000).split("\n...")[0].strip()
    return f"`{text}`".replace("'", "")


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if the page has no markers, or is stale under --check."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--fidelity", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    current = options.fidelity.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if not pattern.search(current):
        sys.stderr.write(f"{options.fidelity}: expected {BEGIN} and {END} in it, got neither\n")
        return 1
    text = block()
    wanted = pattern.sub(lambda _: f"{BEGIN}\n\n{text}\n\n{END}", current, count=1)
    if wanted == current:
        return 0
    if options.check:
        sys.stderr.write("the tables of recipes are stale: run python docs/recipes.py\n")
        return 1
    options.fidelity.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
