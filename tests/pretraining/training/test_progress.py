"""What a run prints: the plan before it reads data, the time of its steps, a line for each part."""

import io
import re

import pytest
from rich.console import Console

from elip_models.pretraining.training.recipe import load_recipe
from elip_models.pretraining.training.summary import print_plan, print_summary
from elip_models.pretraining.training.trainer import train
from tests.helpers.tiers import first_quick
from tests.helpers.tiny_run import tiny_config


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


def test_the_plan_says_why_a_small_model_costs_more_than_dense_and_hides_secrets():
    stream = "data.train={stream: ['https://me:word@host/{0..3}.tar'], samples: 64}"
    rows = plan("clip_tiny", stream, "model.overrides.strategy=elip")
    inference, training = map(float, re.findall(r"\d\.\d\d", rows["reduction"]))
    assert training < 1 < inference and "scorer 'exact' runs layers twice" in rows["reduction"]
    assert "runs layers twice" not in plan("clip_tiny", stream)["reduction"]
    assert "host" in rows["training data"] and "word" not in rows["training data"]


@pytest.mark.parametrize("is_terminal", first_quick([False, True]))
def test_a_run_prints_steps_and_the_start_of_each_part(tmp_path, is_terminal):
    console = Console(file=io.StringIO(), width=120, record=True, force_terminal=is_terminal)
    config = tiny_config(tmp_path, "optim.steps=7", "report=[retrieval, picture]")
    result = train(config, console=console)
    print_summary(config, result, console)
    text = console.export_text()
    parts = [
        " M parameters",  # the plan, before data is read
        "training the tokenizer on the captions of up to 48 samples",
        "evaluating retrieval on 10 samples",
        "image_to_text_r1",
        "drawing kept_",
    ]
    places = [text.index(part) for part in parts]
    assert places == sorted(places) and "7/7" in text
    assert ("step 6/7  loss" in text) is not is_terminal
    assert re.search(r"images/s.* left", text)
    assert ("sample  0/10" in text) is is_terminal
