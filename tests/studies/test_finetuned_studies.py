"""Studies that fine-tune: settings of the second stage, errors, resuming, and whole runs."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from benchmarks.studies import runner
from benchmarks.studies.command import Progress
from benchmarks.studies.page import study_page
from benchmarks.studies.plan import load_study, plan
from benchmarks.studies.study import Run
from elip_models.pretraining.tasks.retrieval import RECALLS
from elip_models.pretraining.training.recipe import load_recipe
from elip_models.pretraining.training.trainer import Trainer
from elip_models.validation import ConfigError, Stopped
from tests.helpers.study_case import tiny_study
from tests.helpers.tiny_run import own_process

QUIET = Console(quiet=True)
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


def test_the_command_line_sets_keys_of_every_second_stage(tmp_path):
    finetuned_study(tmp_path)
    path = tmp_path / "finetuned.yaml"
    study = load_study(path, {"finetune.optim.steps": 5})
    assert study.finetuning(Run("dense", 0)).optim.steps == 5
    assert study.config(Run("dense", 0)).optim.steps == 3
    with pytest.raises(ConfigError, match=r"finetune.optim.lr: expected a key that no arm sets"):
        load_study(path, {"finetune.optim.lr": 0.1})


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


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {"recipe": "retrieval_tny"},
            "recipe 'retrieval_tny': expected .*did you mean 'retrieval_tiny'",
        ),
        ({"optim.lrr": 1}, "optim.lrr: unknown key"),
        ({"data.train": "???"}, r"data.train: required; set finetune.data.train=VALUE$"),
        ({"data.eval": None}, "data.eval: expected held-out samples to score, got null"),
        ({"optim.precision": "bf16"}, "optim.precision: expected 'fp32' as in pre-training"),
        (
            {"recipe": "classification_tiny"},
            "quality: expected metrics of classification, finetuned.accuracy, .*got 'finetuned.im",
        ),
    ],
)
def test_an_invalid_second_stage_raises_before_anything_runs(tmp_path, stage, message):
    study = finetuned_study(tmp_path, finetune=STAGE | stage)
    with pytest.raises(ConfigError, match=f"arms.dense: finetune: {message}"):
        runner.check_settings(study, plan(study))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run the study, stop the fine-tuning of one run, continue, and return its results."""
    with pytest.MonkeyPatch.context() as patch, own_process():
        folder = tmp_path_factory.mktemp("study")
        patch.chdir(folder)
        study = finetuned_study(folder, seeds=[0])
        progress = Progress(study, plan(study), Path("tiny.json"), QUIET, allow_dirty=True)
        step = Trainer._train_step

        def stopping(self):
            if self.step == 1 and self.folder.path == study.finetuned(Run("tome", 0)):
                raise Stopped("ended", 15)
            step(self)

        patch.setattr(Trainer, "_train_step", stopping)
        with pytest.raises(Stopped, match="ended"):
            progress.run()
        before = weights_in(study.folder(Run("tome", 0)))
        assert [run for run in plan(study) if runner.is_finished(study, run)] == [Run("dense", 0)]
        patch.setattr(Trainer, "_train_step", step)
        progress.run()
        after = weights_in(study.folder(Run("tome", 0)))
        assert all(torch.equal(before[name], value) for name, value in after.items())
        runner.check_settings(study, plan(study))
        yield folder, study


@pytest.mark.slow
def test_arms_have_the_downstream_metric_of_their_own_weights(finished, monkeypatch):
    folder, study = finished
    monkeypatch.chdir(folder)
    document = json.loads(Path("tiny.json").read_text())
    assert [run["arm"] for run in document["runs"]] == ["dense", "tome", "shared"]
    for run in document["runs"]:
        assert run["metrics"].keys() == {f"finetuned.{name}" for name in RECALLS}
        assert all(0 <= value <= 1 for value in run["metrics"].values())
        assert run["measures"] == ["finetuned"]
    pretrained = {arm: weights_in(study.folder(Run(arm, 0))) for arm in ("dense", "tome")}
    for arm, own, other in (("dense", "dense", "tome"), ("tome", "tome", "dense")):
        weights = weights_in(study.finetuned(Run(arm, 0)))
        moved = {name: distance(weights, pretrained[name]) for name in (own, other)}
        assert 0 < moved[own] <= 2.1e-6 < 1e-4 < moved[other]
    shared = load_recipe(study.finetuned(Run("shared", 0)) / "recipe.yaml")
    assert shared.model.pretrained == f"{study.root}/dense/0/model"
    assert not (study.folder(Run("shared", 0)) / "model").exists()
    assert [*study.root.rglob("checkpoints")] == []
    page = study_page(document)
    assert f"{RECALL}, points" in page and "`finetune.recipe=retrieval_tiny`" in page


def weights_in(folder):
    """Return the weights that the run in `folder` saved."""
    return load_file(folder / "model" / "model.safetensors")


def distance(weights, others):
    """Return the largest difference of any two weights of equal name."""
    return max((value - others[name]).abs().max().item() for name, value in weights.items())
