"""Built-in studies: each is valid, has a version at full size, and all of its arms are valid."""

import pytest
import torch

from benchmarks.studies import runner
from benchmarks.studies.measures import FINETUNED
from benchmarks.studies.plan import load_study, plan, study_names
from benchmarks.studies.study import FINETUNE, Run
from elip_models.pretraining.training.training_data import meta_model


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Use a folder without runs."""
    monkeypatch.chdir(tmp_path)


DATA = {"data.train": "emoji_scenes:size=900", "data.eval": "emoji_scenes:seed=1,size=9"}


def load(name):
    """Return a built-in study on built-in data, in fine-tuning too if it has this stage."""
    study = load_study(name, DATA)
    if FINETUNED not in study.measures:
        return study
    return load_study(name, DATA | {f"{FINETUNE}{key}": value for key, value in DATA.items()})


@pytest.mark.parametrize("name", study_names())
def test_a_built_in_study_is_valid_and_matches_its_full_size_version(name):
    study = load(name)
    assert study.question and study.paper and len(study.seeds) >= 3
    for arm in study.arms.values():
        assert "steps" not in str(arm.overrides)  # `length` works with any recipe
    if name.endswith("_full"):
        twin = load(name.removesuffix("_full"))
        ours, theirs = (
            {name: arm.overrides for name, arm in each.arms.items() if name != "start"}
            for each in (study, twin)
        )
        assert ours == theirs and study.recipe != twin.recipe and study.group != twin.group


def test_arms_of_equal_name_in_a_group_have_equal_settings():
    seen = {}
    for study in (load(name) for name in study_names()):
        for name, arm in study.arms.items():
            found = study.recipe, study.overrides | arm.overrides, arm.parent, arm.length
            assert seen.setdefault((study.group, name), found) == found, (study.name, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ablations", "text_removal"])
def test_every_arm_of_a_built_in_study_is_valid(name):
    study = load(name)
    runner.check_settings(study, plan(study, seeds=[0]))


@pytest.mark.slow
def test_full_size_studies_take_a_training_step():
    """Run one of several arms that differ only in numbers."""
    name = "text_removal_meter_full"
    seen, study = set(), load(name)
    for arm in study.arms:
        overrides = study.overrides | study.arms[arm].overrides
        strategy = str(overrides.get("model.overrides.strategy")).partition(":")[0]
        kind = study.recipe, strategy
        if kind in seen:
            continue
        seen.add(kind)
        model = meta_model(study.config(Run(arm, 0))).train()
        with torch.device("meta"), model.tracing():
            images = torch.randn(2, 3, *model.tower.image_size)
            model(**model.random_inputs(images)).loss.backward()
        assert all(p.grad is not None for p in model.tower.model.parameters()), arm
    assert seen
