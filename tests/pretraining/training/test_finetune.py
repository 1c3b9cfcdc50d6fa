"""`elip finetune`: recipes by task and family, initial weights, whole runs."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from elip_models.pretraining.models.registry import (
    DOWNSTREAM,
    FAMILIES,
    load_model,
)
from elip_models.pretraining.tasks.registry import TASKS, get_task
from elip_models.pretraining.training.finetune import finetune_recipe
from elip_models.pretraining.training.recipe import FINETUNE, load_recipe
from elip_models.pretraining.training.summary import print_summary
from elip_models.pretraining.training.trainer import train
from elip_models.pretraining.training.training_data import meta_model
from elip_models.validation import ConfigError
from tests.helpers.tiers import first_quick, slow_except
from tests.helpers.tiny_run import elip, logged
from tests.helpers.weights import assert_equal_weights

pytestmark = pytest.mark.usefixtures("own_folder")

QUIET = Console(quiet=True)
DATA = {
    "retrieval": "emoji_scenes:seed={},size={}",
    "vqa": "emoji_questions:seed={},size={}",
    "entailment": "emoji_entailment:seed={},size={}",
    "nlvr2": "emoji_pairs:seed={},size={}",
    "captioning": "emoji_scenes:seed={},size={}",
    "classification": "emoji_classes:seed={},size={}",
}
PARTS = {"train": (0, 16), "eval": (1, 6)}
TINY = {"optim.steps": 2, "optim.batch_size": 4, "trackers": [], "report": [], "log_every": 1}


def run(saved, family, task, *, resume=False, **changes):
    """Train for two steps; return the recipe and the result."""
    data = {f"data.{part}": DATA[task].format(*which) for part, which in PARTS.items()}
    overrides = TINY | data | {"output_dir": "run"} | changes
    config = finetune_recipe(f"{task}_tiny", saved(family), overrides)
    return config, train(config, resume=resume, console=QUIET)


PAIRS = [(model.pretraining.family, model.task) for model in DOWNSTREAM.values()]


@pytest.mark.parametrize(
    ("family", "task"), first_quick([("albef", "vqa"), ("albef", "retrieval")])
)
def test_a_model_is_fine_tuned_scored_and_loaded_again(saved, family, task):
    config, result = run(saved, family, task)
    assert config.model.overrides["vision_depth"] == 2 and not result.model.config.schedule
    assert logged(result.output_dir, *result.task_scores.metrics) == [result.task_scores.metrics]
    assert tuple(result.task_scores.scores) == TASKS[task].metrics
    folder = result.output_dir / "model"
    assert json.loads((folder / "config.json").read_text())["model"] == f"{family}_{task}"
    again = load_model(folder)
    assert_equal_weights(again, result.model)


@pytest.mark.slow
def test_the_summary_has_the_scores_and_writes_the_predictions(saved, tmp_path):
    config, result = run(saved, "albef", "nlvr2")
    console = Console(file=(tmp_path / "said.txt").open("w"), width=200)
    print_summary(config, result, console)
    text = (tmp_path / "said.txt").read_text()
    assert "nlvr2: 6 examples" in text and "majority" in text and "scores.json" in text
    scores = json.loads(Path("run/scores.json").read_text())
    assert len(scores["predictions"]) == 6


def test_the_commands_fine_tune_and_score(saved, capsys):
    given = [f"{key}={value}" for key, value in TINY.items()]
    data = [f"data.train={DATA['vqa'].format(0, 16)}", f"data.eval={DATA['vqa'].format(1, 6)}"]
    assert elip("finetune", "vqa_tiny", "--from", saved("meter"), *given, *data) == 0
    written = json.loads(Path("runs/vqa_tiny/scores.json").read_text())
    folder, spec = "runs/vqa_tiny/model", DATA["vqa"].format(1, 6)
    assert elip("eval", "vqa", "--model", folder, "--data", spec, "--output", "again.json") == 0
    assert json.loads(Path("again.json").read_text()) == written
    capsys.readouterr()
    assert elip("eval", "nlvr2", "--model", folder, "--data", DATA["nlvr2"].format(1, 6)) == 2
    said = capsys.readouterr().err
    assert "expected a model trained by `elip finetune nlvr2`, got METERVQA, one for vqa" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune/vqa_meter", "finetune/captioning_blip_elip"])
def test_a_full_size_recipe_takes_a_step(name):
    task, _, family = name.removeprefix(f"{FINETUNE}/").partition("_")
    given = ["data.train=a", "data.eval=b", "data.tokenizer=c", "model.pretrained=d"]
    given.append("data.validation=e")
    config = load_recipe(name, given)
    assert config.task == task and config.model.name.startswith(family.split("_")[0])
    get_task(config.task, **config.task_options)
    model = meta_model(config).train()
    with torch.device("meta"), model.tracing():
        images = torch.randn(2, 3, *model.tower.image_size)
        model(**model.random_inputs(images)).loss.backward()
    assert any(p.grad is not None for p in model.parameters())


EACH = [(family, "retrieval") for family in FAMILIES]
EACH += [("albef", "entailment"), ("blip", "vqa"), ("meter", "nlvr2"), ("blip", "captioning")]


@pytest.mark.parametrize(("family", "task"), slow_except(EACH, PAIRS))
def test_a_task_name_selects_the_recipe_of_the_family(saved, family, task):
    data = {f"data.{part}": f"{part}.json" for part in ("train", "validation", "eval")}
    config = finetune_recipe(task, saved(family), data)
    assert (config.task, config.model.pretrained) == (task, str(saved(family)))
    model = meta_model(config).config
    assert model.vision_width == 64 and model.schedule is None  # the saved model's, but dense
    if family != "clip":
        assert model.image_size == config.model.overrides["image_size"] > 32  # the recipe's
    assert model.resize == (config.data.resize or "crop")


def test_the_tower_is_dense_by_default(saved):
    dense = finetune_recipe("vqa_tiny", saved("albef"), {})
    assert "schedule" not in dense.model.overrides
    reduced = finetune_recipe("vqa_tiny", saved("albef"), {}, reduced=True)
    assert reduced.model.overrides["schedule"] == "1(100%) 1(50%)"
    asked = finetune_recipe("vqa_tiny", saved("albef"), {"model.overrides.strategy": "tome"})
    assert meta_model(asked).config.strategy == "tome"


@pytest.mark.parametrize(("family", "task"), [("blip", "captioning"), ("clip", "classification")])
@pytest.mark.parametrize("reduced", [False, True])
def test_without_text_the_reduction_is_vision_only(saved, family, task, reduced):
    said = {} if reduced else {"model.overrides.schedule": "1(100%) 1(50%)"}
    model = meta_model(finetune_recipe(f"{task}_tiny", saved(family), said, reduced=reduced))
    assert model.config.without_text == "vision"
    assert model.reduction.reduces(None, training=False)


@pytest.mark.parametrize("family", ["blip_vqa", "blip_nlvr2", "blip_captioning"])
def test_options_that_a_task_ignores_raise(family):
    with pytest.raises(ValueError, match="momentum_reduction: expected"):
        DOWNSTREAM[family].config_class(schedule="paper", momentum_reduction="shared")


@pytest.mark.parametrize(
    ("task", "family", "message"),
    [
        ("vqaa", "albef", "recipe 'vqaa': expected a path .*did you mean 'vqa"),
        ("entailment", "blip", "TASK: task: expected a task of BLIP, .*got 'entailment'"),
        ("captioning_tiny", "albef", "task: expected a task of ALBEF, .*got 'captioning'"),
    ],
)
def test_an_unknown_task_raises(saved, task, family, message):
    with pytest.raises(ConfigError, match=message):
        finetune_recipe(task, saved(family), {})


@pytest.mark.slow
def test_lora_trains_few_parameters_and_saves_less_for_backward(saved):
    _, full = run(saved, "albef", "vqa", output_dir="full")
    _, lora = run(saved, "albef", "vqa", **{"peft.kind": "lora", "peft.r": 2})
    moved = {name for name, p in lora.model.named_parameters() if p.requires_grad}
    assert moved and all("lora" in name or "temperature" in name for name in moved)
    keys = ("trainable", "trainable_share", "saved_bytes")
    (of_full,), (of_lora,) = (logged(run.output_dir, *keys) for run in (full, lora))
    assert of_full["trainable_share"] == 1 and of_lora["trainable_share"] < 0.05
    assert of_lora["saved_bytes"] < of_full["saved_bytes"]
    again = load_model(lora.output_dir / "model")
    assert again.adapted is not None
    assert_equal_weights(again, lora.model)
