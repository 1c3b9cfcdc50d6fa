"""Write the tables of recipes in docs/fidelity.md: ours, the original, its source, the difference.

    python docs/recipes.py             # rewrite the block between the two markers
    python docs/recipes.py --check     # exit status 1 where it is stale

What the originals have stands in docs/originals.yaml; what ours have, the recipes themselves say.
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
FIDELITY = FOLDER / "fidelity.md"
BEGIN, END = "<!-- recipes:begin -->", "<!-- recipes:end -->"


def read_originals() -> dict[str, Any]:
    """The tables by recipe, and under 'beyond' what no key says."""
    return yaml.safe_load((FOLDER / "originals.yaml").read_text(encoding="utf-8"))


@cache
def ours(recipe: str) -> dict[str, Any]:
    """Dotted key -> value of a recipe, and of its model's config under 'config.'."""
    config = load_recipe(recipe, ["data.train=a.json"])
    inputs = {"captions": config.data.captions, "resize": config.data.resize}
    with torch.device("meta"):
        model = create_model(config.model.name, **inputs | config.model.overrides)
    values: dict[str, Any] = {"seed": config.seed}
    for section in ("model", "data", "optim"):
        values |= {f"{section}.{k}": v for k, v in asdict(getattr(config, section)).items()}
    return values | {f"config.{name}": value for name, value in asdict(model.config).items()}


def is_same(value: Any, original: Any) -> bool:
    """A list of YAML is a tuple here."""
    return (list(value) if isinstance(value, tuple) else value) == original


def block() -> str:
    """The tables, and what differs beyond the keys."""
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
    """A value as YAML writes it, words as they are."""
    if isinstance(value, str) and " " in value and "(" not in value:
        return value
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=1000).split("\n...")[0].strip()
    return f"`{text}`".replace("'", "")


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 where the file is stale under --check."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    parser.add_argument("--fidelity", type=Path, default=FIDELITY)
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
