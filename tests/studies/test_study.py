"""Studies: planning, resuming, errors and result files."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.studies import runner
from benchmarks.studies.command import Progress
from benchmarks.studies.measures import MEASURES, RETRIEVAL_METRICS
from benchmarks.studies.page import study_page
from benchmarks.studies.plan import plan
from benchmarks.studies.study import Run
from elip_models.pretraining.training.trainer import Trainer
from elip_models.strategies import STRATEGIES, ToMe
from elip_models.validation import ConfigError, TrainingError
from tests.helpers.study_case import tiny_study
from tests.helpers.tiny_run import logged, own_process

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with own_process():
        yield


def run_all(study, **options):
    runs = plan(study, **options)
    begun = []
    runner.run_study(study, runs, console=QUIET, before=begun.append, after=lambda: None)
    return begun


# Planning


def test_all_arms_of_a_seed_run_before_any_of_the_next(tmp_path):
    study = tiny_study(tmp_path)
    names = ["dense", "tome", "after-0.61", "after-0.82"]
    assert plan(study) == [Run(name, seed) for seed in (0, 1) for name in names]
    assert plan(study, seeds=[7]) == [Run(name, 7) for name in names]


def test_an_arm_overrides_the_recipe_and_the_study(tmp_path):
    arms = {"long": {"length": 2, "optim.lr": 1e-4, "from": "dense"}}
    study = tiny_study(tmp_path, arms=arms)
    dense, tome, long = (study.config(Run(arm, 1)) for arm in ("dense", "tome", "long"))
    assert dense.seed == 1 and dense.report == () and dense.model.overrides["schedule"] is None
    options = tome.model.overrides["strategy_options"]
    assert options == asdict(ToMe(10 / (3 * 16)))
    assert (long.optim.steps, long.optim.lr) == (6, 1e-4)
    assert long.model.pretrained == long.data.tokenizer == "runs/studies/tiny/dense/1/model"
    assert dense.data.tokenizer == tome.data.tokenizer == "runs/studies/tiny/tokenizer"


def test_arms_begin_with_the_parent_that_the_study_names(tmp_path):
    study = tiny_study(tmp_path, **{"from": "tome", "arms": {"fresh": {"from": None}}})
    parents = {name: arm.parent for name, arm in study.arms.items()}
    assert next(iter(parents)) == "tome"
    assert parents == {
        "tome": None,
        "dense": "tome",
        "fresh": None,
        "after-0.61": "dense",
        "after-0.82": "dense",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [-1]}, r"seeds: expected a tuple, each an integer in \[0, 4294967295\]"),
        ({"measures": ["taste"]}, "measures: expected some of retrieval, .*finetuned, got 'taste'"),
        ({"references": ["danse"]}, "references: expected some of .*got 'danse'"),
        ({"colour": 1}, "colour: unknown key"),
        ({"arms": {"a": 3}}, "arms.a: expected a mapping of keys, got 3"),
        ({"arms": {"a": {"at_flops": 2}}}, r"arms.a.at_flops: expected .*\(0, 1\].* got 2"),
        ({"arms": {"a": {"from": "b"}}}, r"arms.a.from: expected an arm that trains .*got 'b'"),
        ({"arms": {"a": {"length": 0}}}, "arms.a.length: expected above 0 without 'from', got 0"),
        ({"arms": {"a": {"from": "after-0.61"}}}, "arms.a.from: expected an arm that trains"),
    ],
)
def test_an_invalid_study_raises(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_study(tmp_path, **changes)


# Running


@pytest.fixture
def stubbed(monkeypatch):
    """Replace trainer and measures by stubs; return the names of the runs they received."""
    seen = []

    def train(config, **options):
        seen.append(config.name)
        runner.RunFolder(config.output_dir).record_start(config, {})

    monkeypatch.setattr(runner, "train", train)
    monkeypatch.setattr(runner, "_open", lambda *arguments: None)
    monkeypatch.setattr(runner, "step_time", lambda finished: 1.0)
    monkeypatch.setattr(runner, "_make_tokenizer", lambda *arguments: None)
    monkeypatch.setattr(runner, "measure", lambda finished, names: dict.fromkeys(names, 0.5))
    return seen


def test_a_killed_study_repeats_no_finished_run(tmp_path, stubbed, monkeypatch):
    study, train = tiny_study(tmp_path), runner.train

    def killed(config, **options):
        train(config)
        if config.name == "tiny/dense/1":
            raise KeyboardInterrupt

    monkeypatch.setattr(runner, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        run_all(study)
    assert stubbed == ["tiny/dense/0", "tiny/tome/0", "tiny/dense/1"]
    monkeypatch.setattr(runner, "train", train)
    assert run_all(study) == plan(study, seeds=[1])
    assert stubbed[3:] == ["tiny/dense/1", "tiny/tome/1"]
    assert run_all(study) == []


def test_a_failed_run_raises_after_all_others_ran(tmp_path, stubbed, monkeypatch):
    train = runner.train

    def failing(config, **options):
        train(config)
        if config.name == "tiny/tome/0":
            raise TrainingError("not finite")

    monkeypatch.setattr(runner, "train", failing)
    with pytest.raises(TrainingError, match="1 runs failed: tome, seed 0: not finite"):
        run_all(tiny_study(tmp_path))
    assert len(stubbed) == 4


def test_a_result_of_other_settings_raises(tmp_path, stubbed):
    run_all(tiny_study(tmp_path), only=["dense"])
    changed = tiny_study(tmp_path, overrides={"optim.steps": 4})
    message = r"tiny/dense/0 was made with other settings: optim.steps: 3 -> 4; remove it"
    with pytest.raises(ConfigError, match=message):
        runner.check_settings(changed, plan(changed))


# End to end


@pytest.mark.slow
def test_a_tiny_study_is_killed_resumes_and_is_written(tmp_path, monkeypatch):
    other = {"model.overrides.fusion": 0.5}
    study = tiny_study(tmp_path, measures=[*MEASURES][:3], arms={"other": other})
    step, last = Trainer._train_step, study.folder(Run("tome", 1))

    def killed(self):
        if self.step == 2 and self.folder.path == last:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(Trainer, "_train_step", killed)
    path = tmp_path / "results" / "tiny.json"
    progress = Progress(study, plan(study), path, QUIET, allow_dirty=True)
    with pytest.raises(KeyboardInterrupt):
        progress.run()
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("result.json")}
    assert len(before) == 6
    monkeypatch.setattr(Trainer, "_train_step", step)
    progress.run()
    assert (
        before.items()
        <= {p: p.stat().st_mtime_ns for p in Path("runs").rglob("result.json")}.items()
    )
    assert [row["step"] for row in logged(last, "loss", "step")] == [1, 2, 3]
    found = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert {(run["arm"], run["seed"]) for run in found["runs"]} == set(plan(study))
    for run in found["runs"]:
        metrics = run["metrics"]
        own = {name for name in metrics if not name.startswith(("objective.", "selection."))}
        assert own == RETRIEVAL_METRICS
        assert metrics["objective.loss"] > 0 and 0 <= metrics["reduced.r1"] <= 1
        assert ("selection.lost" in metrics) == (run["arm"] != "dense")
        assert ("selection.last.kept" in metrics) == (run["arm"] not in ("dense", "tome"))
        trained = not run["arm"].startswith("after")
        assert ("step_time" in run) == trained == (run["beginning"] is None)
        assert ("loss" in run) == ("images" in run) == (not run["arm"].startswith("after"))
    assert [*Path("runs").rglob("checkpoints")] == []
    assert "+" in study_page(found)


@pytest.mark.slow
def test_arms_of_a_seed_share_initialisation_and_batches(tmp_path):
    arms = {name: {"model.overrides.strategy": name} for name in STRATEGIES}
    arms["guided"] = {"model.overrides.guidance_norm": "match"}
    study = tiny_study(tmp_path, arms=arms)

    def begun(arm, seed):
        config = study.config(Run(arm, seed))
        Path(config.output_dir).mkdir(parents=True)
        runner._make_tokenizer(study, config)
        trainer = Trainer(config, resume=True, console=QUIET)
        trainer.prepare()
        weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.model.train()
        trainer._train_step()  # random numbers of a strategy must not change the data
        batch = trainer.batches.next_batch()
        return weights | {name: batch[name] for name in ("images", "input_ids")}

    reference = begun("dense", 0)
    for name in arms.keys() - {"dense"}:
        found = begun(name, 0)
        assert found.keys() == reference.keys()
        assert all(torch.equal(found[key], reference[key]) for key in found), name
    assert not torch.equal(begun("dense", 1)["images"], reference["images"])
