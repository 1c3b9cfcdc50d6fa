"""`eval.select`: the weights that are best on the validation split are the result."""

import copy
import json
from pathlib import Path

import pytest
from rich.console import Console

from elip_models.intervals import score_interval
from elip_models.pretraining.models.registry import load_model
from elip_models.pretraining.tasks.registry import TASKS
from elip_models.pretraining.tasks.task import TaskScores
from elip_models.pretraining.training.evaluation import RECORD
from elip_models.pretraining.training.finetune import finetune_recipe
from elip_models.pretraining.training.summary import print_summary
from elip_models.pretraining.training.trainer import Trainer, train
from elip_models.validation import ConfigError
from tests.helpers.tiny_run import elip, logged
from tests.helpers.weights import assert_equal_weights

pytestmark = pytest.mark.usefixtures("own_folder")

TINY = {
    "data.train": "emoji_entailment:seed=0,size=16",
    "data.validation": "emoji_entailment:seed=2,size=5",
    "data.eval": "emoji_entailment:seed=1,size=6",
    "eval.select": "accuracy",
    "optim.steps": 4,
    "optim.batch_size": 4,
    "optim.warmup_steps": 0,
    "trackers": [],
    "report": [],
    "log_every": 1,
    "eval_every": 1,
    "checkpoint_every": 1,
    "output_dir": "run",
}


@pytest.fixture
def values(monkeypatch):
    """Return a list of the accuracies that the evaluations on the validation split will give."""
    given, evaluate = [], TASKS["entailment"].evaluate

    def evaluated(task, model, tokenizer, source, loading, answers=None):
        scores = evaluate(task, model, tokenizer, source, loading, answers)
        if len(source) != 5:  # that of `data.validation`
            return scores
        correct = [1.0] * given.pop(0) + [0.0] * 100
        return TaskScores("entailment", {"accuracy": score_interval(correct[:100], None)}, {}, 100)

    monkeypatch.setattr(TASKS["entailment"], "evaluate", evaluated)
    return given


def config_of(saved, **changes):
    return finetune_recipe("entailment_tiny", saved("albef"), TINY | changes)


def test_the_best_weights_are_stored_and_scored(saved, values, capsys):
    values += [30, 60, 60, 50]
    steps, evaluate = {}, Trainer._evaluate

    def remember(trainer, *arguments):
        scores = evaluate(trainer, *arguments)
        steps[trainer.step] = copy.deepcopy(trainer.model)
        return scores

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_evaluate", remember)
        result = train(config := config_of(saved))
    assert result.selection.step == 2 and result.selection.value == pytest.approx(0.6)
    assert_equal_weights(result.model, steps[2])
    assert_equal_weights(load_model("run/best"), steps[2])
    assert_equal_weights(load_model("run/model"), steps[4])
    rows = logged(result.output_dir, "validation_accuracy")
    assert [round(row["validation_accuracy"], 2) for row in rows] == [0.3, 0.6, 0.6, 0.5]
    assert logged(result.output_dir, "entailment_accuracy") == [result.task_scores.metrics]
    print_summary(config, result, Console(quiet=True))
    written = json.loads(Path("run/scores.json").read_text())
    assert written["scores"] == result.task_scores.as_dict()["scores"]
    assert (written["selection"]["step"], written["selection"]["metrics"]) == (2, ["accuracy"])
    capsys.readouterr()
    arguments = ("--data", TINY["data.eval"], "--output", "again.json")
    assert elip("eval", "entailment", "--model", "run", *arguments) == 0
    assert "evaluating run/best, weights of step 2, the best on data.validation" in (
        " ".join(capsys.readouterr().out.split())
    )
    assert json.loads(Path("again.json").read_text())["scores"] == written["scores"]
    assert elip("eval", "entailment", "--model", "run/model", *arguments) == 0
    assert "best" not in capsys.readouterr().out


def test_a_killed_run_continues_exactly_and_keeps_the_best_weights(saved, values, monkeypatch):
    values += [30, 60, 50, 40] * 2
    whole = train(config_of(saved, output_dir="whole"))
    step = Trainer._train_step

    def killed(trainer):
        if trainer.step == 3:
            raise KeyboardInterrupt
        step(trainer)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_train_step", killed)
        train(config_of(saved))
    Path("run/best").rename("run/.best.replaced")  # as if it was killed in between
    result = train(config_of(saved), resume=True)
    assert result.selection == whole.selection and result.selection.step == 2 and not values
    assert (result.loss, result.task_scores) == (whole.loss, whole.task_scores)
    assert json.loads((Path("run/best") / RECORD).read_text())["step"] == 2
    assert not list(Path("run").glob(".best*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval.select": "accurac"}, r"eval\.select: expected some of accuracy, .*did you mean"),
        ({"eval.select": ["accuracy", "cider"]}, r"the metrics of entailment, got \"cider\""),
        ({"data.validation": None}, r"data\.validation: expected a source, since eval\.select"),
        ({"data.validation": TINY["data.eval"]}, "expected another split than data.eval"),
    ],
)
def test_a_selection_that_cannot_be_made_raises(saved, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(config_of(saved, **changes))
