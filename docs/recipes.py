"""Write the tables of recipes: our value, the original value, its source.

python docs/recipes.py             # rewrite the block between two markers
python docs/recipes.py --check     # exit status 1 if the block is stale

docs/original_recipes.md has every value of the pre-training recipes, the differences of the
fine-tuning recipes, and ELIP's own values beside those of ALBEF and BLIP. The original values are
in docs/originals.yaml and docs/originals_finetune.yaml; ours are read from the recipes.
"""

from collections.abc import Iterator
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.marked_block import Block, run
from elip_models.pretraining.models.registry import create_model
from elip_models.pretraining.training.recipe import FINETUNE, load_recipe, recipe_settings

FOLDER = Path(__file__).parent
PAGE = FOLDER / "original_recipes.md"
OF_FINE_TUNING = """### Fine-tuning recipes

The recipes of `elip finetune` have the values of the original configurations, except for these
differences. METER's recipes are those of ELIP too: its configuration is unchanged.
"""


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


NOT_COMPARED = {
    *("name", "output_dir", "task", "model.name", "model.pretrained", "data.train", "data.eval"),
    *("data.validation", "data.num_workers", "data.max_bad_share", "log_every", "eval_every"),
    *("checkpoint_every", "keep_checkpoints", "trackers", "report"),
}
"""Keys of a fine-tuning recipe that name its data and output, or touch no gradient."""


@cache
def read_finetune_originals() -> dict[str, Any]:
    """Return the original values and the differences of the fine-tuning recipes."""
    return yaml.safe_load((FOLDER / "originals_finetune.yaml").read_text(encoding="utf-8"))


@cache
def finetune_values(recipe: str) -> dict[str, Any]:
    """Return the compared keys that a fine-tuning recipe sets, those of its base included."""
    found = {}
    for key, value, source, _ in recipe_settings(f"{FINETUNE}/{recipe}"):
        nested = key in ("task_options", "model.overrides")
        values = {f"{key}.{name}": each for name, each in value.items()} if nested else {key: value}
        if source == "recipe":
            found |= {name: each for name, each in values.items() if name not in NOT_COMPARED}
    return found


def matching(patterns: list[str]) -> list[str]:
    """Return the fine-tuning recipes that match one of the patterns."""
    names = read_finetune_originals()["recipes"]
    return [name for name in names if any(fnmatchcase(name, each) for each in patterns)]


def finetune_block() -> str:
    """Return the differences of the fine-tuning recipes, and ELIP's values beside the originals."""
    lines = [_row("recipes", "what", "ours", "original", "source"), "| --- " * 5 + "|"]
    for row in read_finetune_originals()["differences"]:
        key, ours = row.get("key"), row.get("ours")
        if key is not None:
            values = [finetune_values(name)[key] for name in matching(row["recipes"])]
            ours = ", ".join(dict.fromkeys(map(_shown, values)))
        names = ", ".join(f"`{name}`" for name in row["recipes"])
        what = f"`{key}`" if key is not None else row["what"]
        lines.append(_row(names, what, ours, row["original"], row["source"]))
    lines += ["", "ELIP's code has other values than ALBEF and BLIP. Each column is a recipe:", ""]
    lines += [_row("recipe", "key", "ALBEF, BLIP", "ELIP: `RECIPE_elip`"), "| --- " * 4 + "|"]
    return "\n".join([*lines, *_values_of_elip()])


def _values_of_elip() -> Iterator[str]:
    for name in read_finetune_originals()["recipes"]:
        if not name.endswith("_elip"):
            continue
        base = name.removesuffix("_elip")
        original = finetune_values(base)
        for key, value in finetune_values(name).items():
            if value != original[key]:
                yield _row(f"`{base}`", f"`{key}`", _shown(original[key]), _shown(value))


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _shown(value: Any) -> str:
    """Return a value as YAML writes it; text with spaces stays as it is."""
    if isinstance(value, str) and " " in value and "(" not in value:
        return value
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=1000).split("\n...")[0].strip()
    return f"`{text}`".replace("'", "")


def blocks() -> list[Block]:
    """Return the tables of pre-training and of fine-tuning."""
    return [Block(PAGE, "recipes", f"{block()}\n\n{OF_FINE_TUNING}\n{finetune_block()}")]


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if a page has no markers, or is stale under --check."""
    return run(blocks, "python docs/recipes.py", __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
