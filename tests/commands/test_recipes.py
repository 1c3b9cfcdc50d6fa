"""`elip recipes` lists every recipe; `elip recipes show` agrees with the recipe that is trained."""

import pytest

from elip_models.pretraining.training.recipe import (
    FINETUNE,
    load_recipe,
    recipe_names,
    recipe_settings,
    recipe_title,
    resume_conflicts,
)
from elip_models.pretraining.training.yaml_config import REQUIRED, yaml_line
from tests.helpers.tiny_run import elip

NAMES = recipe_names() + recipe_names(FINETUNE)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")


def rows(printed):
    """Return the cells of the rows of printed tables, by the first cell."""
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines()]
    return {first: rest for first, *rest in cells if rest}


def test_every_recipe_is_listed_with_one_line(capsys):
    assert elip("recipes") == 0
    listed = rows(capsys.readouterr().out)
    assert listed == {name.removeprefix(f"{FINETUNE}/"): [recipe_title(name)] for name in NAMES}
    assert all(len(title) > 10 for (title,) in listed.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_settings_give_the_same_run_as_the_recipe(name):
    settings = recipe_settings(name)
    required = [f"{each.key}={each.key}" for each in settings if each.value == REQUIRED]
    given = [f"{each.key}={yaml_line(each.value)}" for each in settings if each.value != REQUIRED]
    expected = load_recipe(name, required)
    assert not resume_conflicts(expected, load_recipe(name, [*required, *given]), may_change=())
    assert all(len(each.meaning) > 10 for each in settings)
    assert {each.source for each in settings} == {"recipe", "default"}


def test_show_names_where_each_value_comes_from(capsys):
    assert elip("recipes", "show", "clip_vit_s16_cc3m") == 0
    shown = rows(capsys.readouterr().out)
    assert shown["optim.weight_decay"][:2] == ["0.1", "recipe"]
    assert shown["optim.decay"][:2] == ["cosine", "default"]
    assert shown["data.train"][:2] == ["set data.train=VALUE", "required"]
    assert shown["optim.lr"][2] == "Peak learning rate"


def test_show_of_an_unknown_recipe_suggests_one(capsys):
    assert elip("recipes", "show", "clip_tny") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: NAME: recipe 'clip_tny': expected a path ending in .yaml, or a")
    assert error.endswith("did you mean 'clip_tiny'?\n")
