"""What a run prints: the plan, before it reads data."""

import io
import re

from rich.console import Console

from elip_models.pretraining.training.recipe import load_recipe
from elip_models.pretraining.training.summary import print_plan


def plan(recipe, *overrides, num_processes=1):
    """Return the rows of a plan by their names."""
    console = Console(file=io.StringIO(), width=300, record=True)
    print_plan(load_recipe(recipe, overrides), console, device="cuda", num_processes=num_processes)
    lines = [line.strip("│ ") for line in console.export_text().splitlines()]
    rows = dict(line.split("  ", 1) for line in lines if "  " in line)
    return {name: value.strip() for name, value in rows.items()}


def test_the_plan_names_model_reduction_data_length_and_folder():
    rows = plan("blip_4m", "data.train=[a.json]", "output_dir=runs/mine", num_processes=8)
    assert re.fullmatch(r"elip_blip, about [\d.]+ M parameters", rows["model"])
    assert rows["reduction"].startswith("image tower: elip: ")
    assert (rows["training data"], rows["evaluation data"]) == ("a.json", "none")
    assert rows["length"] == "15 epochs, 848 images per step, on 8 processes on cuda"
    assert rows["folder"] == "runs/mine"
