"""Studies that fine-tune: settings of the second stage, and errors."""

import json

import pytest

from benchmarks.studies.plan import load_study
from benchmarks.studies.study import Run
from elip_models.validation import ConfigError
from tests.helpers.study_case import tiny_study
from tests.helpers.tiny_run import own_process

STAGE = {
    "recipe": "retrieval_tiny",
    "data.train": "emoji_scenes:seed=2,size=16",
    "data.eval": "emoji_scenes:seed=3,size=6",
    "data.context_length": 24,
    "optim.batch_size": 8,
    "optim.steps": 2,
    "optim.lr": 1e-6,
    "optim.warmup_steps": 0,
}
RECALL = "finetuned.image_to_text_r1"
MEASURED = {"measures": ["finetuned"], "quality": [RECALL]}
LATER = {"from": "dense", "length": 0, "model.overrides.strategy": "tome"}
ARMS = {
    "tome": {"model.overrides.strategy": "tome", "finetune": {"reduced": True}},
    "after": None,
    "shared": LATER | {"finetune": {"reduced": True, "optim.lr": 1e-3}},
}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with own_process():
        yield


def finetuned_study(folder, **changes):
    """Return the tiny study of two arms that pre-train, and one that shares the dense model."""
    tiny_study(folder)
    path = folder / "finetuned.yaml"
    values = {"like": "tiny.yaml", "finetune": STAGE, **MEASURED} | changes
    values["arms"] = ARMS | changes.get("arms", {})
    path.write_text(json.dumps(values))
    return load_study(path)


def test_an_arm_changes_keys_of_the_second_stage_alone(tmp_path):
    study = finetuned_study(tmp_path)
    dense, tome, shared = (study.finetuning(Run(arm, 1)) for arm in ("dense", "tome", "shared"))
    assert dense.task == "retrieval" and dense.seed == 1 and dense.trackers == ()
    assert [each.optim.lr for each in (dense, tome, shared)] == [1e-6, 1e-6, 1e-3]
    folders = [f"runs/studies/finetuned/{arm}/1" for arm in ("dense", "tome", "shared")]
    assert [each.output_dir for each in (dense, tome, shared)] == [
        f"{folder}/finetuned" for folder in folders
    ]
    begins = [f"{folder}/model" for folder in (folders[0], folders[1], folders[0])]
    for config, model in zip((dense, tome, shared), begins, strict=True):
        assert config.model.pretrained == config.data.tokenizer == model
        assert config.model.overrides["vision_width"] == 32
    assert "strategy" not in dense.model.overrides
    assert tome.model.overrides["strategy"] == shared.model.overrides["strategy"] == "tome"
    assert study.config(Run("dense", 1)).optim.steps == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"measures": ["retrieval"], "quality": ["dense.r1"]},
            "measures: expected 'finetuned' exactly if .*got retrieval and finetune.recipe",
        ),
        ({"quality": ["dense.r1"]}, "quality: expected metrics of finetuned, got 'dense.r1'"),
        ({"arms": {"a": {"finetune": {"seed": 1}}}}, "finetune.seed: the runner sets it"),
    ],
)
def test_an_invalid_second_stage_raises(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        finetuned_study(tmp_path, **changes)
