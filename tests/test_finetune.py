"""`elip finetune`: recipes by task and family, what a model begins with, runs from end to end."""

import json

import pytest
import torch
from rich.console import Console

from elip_models.data import open_source, train_tokenizer
from elip_models.models.registry import CONFIGS, DOWNSTREAM, create_model, family_of, load_model
from elip_models.tasks.registry import TASKS, get_task
from elip_models.training.finetune import finetune_recipe
from elip_models.training.recipe import FINETUNE, load_recipe, recipe_names
from elip_models.training.trainer import train
from elip_models.training.training_data import meta_model
from elip_models.validation import ConfigError
from tests.tiny_run import logged, own_process

QUIET = Console(quiet=True)
DATA = {
    "retrieval": "emoji_scenes:seed={},size={}",
    "vqa": "emoji_questions:seed={},size={}",
    "entailment": "emoji_entailment:seed={},size={}",
    "nlvr2": "emoji_pairs:seed={},size={}",
    "captioning": "emoji_scenes:seed={},size={}",
    "classification": "emoji_classes:seed={},size={}",
}
FULL = [name for name in recipe_names(FINETUNE) if not name.endswith("_tiny")]
TINY = {"optim.steps": 2, "optim.batch_size": 4, "trackers": [], "report": [], "log_every": 1}


@pytest.fixture(autouse=True)
def _own_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with own_process():
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of a pre-trained tiny model and its tokenizer, by family."""
    source, made = open_source("emoji_scenes:size=40", image_size=32), {}

    def folder(family):
        if family not in made:
            captions = (text for i in range(40) for text in source.captions(i))
            tokenizer = train_tokenizer(captions, 300)
            sizes = family_of(f"{family}_tiny").fit_tokenizer(tokenizer, 32)
            torch.manual_seed(0)
            model = create_model(
                f"{family}_tiny", image_size=32, vision_depth=2, schedule="1(100%) 1(50%)", **sizes
            )
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family], tokenizer=tokenizer)
        return made[family]

    return folder


def run(saved, family, task, **changes):
    """A run of two steps: its recipe, and what it left."""
    data = {"data.train": DATA[task].format(0, 16), "data.eval": DATA[task].format(1, 6)}
    overrides = TINY | data | {"output_dir": "run"} | changes
    config = finetune_recipe(f"{task}_tiny", saved(family), overrides)
    return config, train(config, console=QUIET)


def pairs(*quick):
    """Families of models for tasks, all but the quick ones slow."""
    every = [(m.pretraining.family, m.task) for m in DOWNSTREAM.values()]
    return [pytest.param(*p, marks=() if p in quick else pytest.mark.slow) for p in every]


@pytest.mark.parametrize(("family", "task"), pairs(("albef", "vqa"), ("clip", "classification")))
def test_a_model_is_fine_tuned_scored_and_loaded_again(saved, family, task):
    config, result = run(saved, family, task)
    assert config.model.overrides["vision_depth"] == 2 and not result.model.config.schedule
    assert logged(result.output_dir, *result.task_scores.metrics) == [result.task_scores.metrics]
    folder = result.output_dir / "model"
    assert json.loads((folder / "config.json").read_text())["model"] == f"{family}_{task}"
    again = load_model(folder)
    for name, weight in result.model.state_dict().items():
        assert torch.equal(weight.cpu(), again.state_dict()[name]), name


def test_a_killed_run_goes_on_as_if_it_had_not_been(saved):
    config, whole = run(saved, "albef", "entailment", output_dir="whole", checkpoint_every=1)
    config, _ = run(saved, "albef", "entailment", **{"optim.steps": 1, "checkpoint_every": 1})
    overrides = {"output_dir": "run", "checkpoint_every": 1} | TINY
    data = {key: getattr(config.data, key.split(".")[1]) for key in ("data.train", "data.eval")}
    longer = finetune_recipe("entailment_tiny", saved("albef"), overrides | data)
    resumed = train(longer, resume=True, console=QUIET)
    assert resumed.step == 2
    lr = logged(resumed.output_dir, "lr")
    assert len(lr) == 2  # the schedule of a longer run differs, what it has read does not
    assert whole.task_scores.num_examples == resumed.task_scores.num_examples


@pytest.mark.parametrize("name", FULL)
def test_a_recipe_at_full_size_takes_a_step_as_it_is(name):
    task, _, family = name.removeprefix(f"{FINETUNE}/").partition("_")
    given = ["data.train=a", "data.eval=b", "data.tokenizer=c", "model.pretrained=d"]
    config = load_recipe(name, given)
    assert config.task == task and config.model.name.startswith(family.split("_")[0])
    get_task(config.task, **config.task_options)
    model = meta_model(config).train()
    with torch.device("meta"), model.tracing():
        images = torch.randn(2, 3, *model.tower.image_size)
        model(**model.random_inputs(images)).loss.backward()
    assert any(p.grad is not None for p in model.parameters())


def test_every_model_of_a_task_has_a_recipe_and_every_task_one_for_tiny_models():
    names = {name.removeprefix(f"{FINETUNE}/") for name in recipe_names(FINETUNE)}
    wanted = {f"{model.task}_{model.pretraining.family}" for model in DOWNSTREAM.values()}
    wanted |= {f"{task}_tiny" for task in TASKS}
    assert wanted <= names


def test_the_tower_is_dense_unless_it_stays_reduced(saved):
    dense = finetune_recipe("vqa_tiny", saved("albef"), {})
    assert "schedule" not in dense.model.overrides
    reduced = finetune_recipe("vqa_tiny", saved("albef"), {}, reduced=True)
    assert reduced.model.overrides["schedule"] == "1(100%) 1(50%)"
    asked = finetune_recipe("vqa_tiny", saved("albef"), {"model.overrides.strategy": "tome"})
    assert meta_model(asked).config.strategy == "tome"


@pytest.mark.parametrize(
    ("task", "family", "message"),
    [
        ("vqaa", "albef", "TASK: expected one of .*did you mean 'vqa"),
        ("captioning_tiny", "albef", "task: expected one of those of ALBEF, .*got 'captioning'"),
    ],
)
def test_a_task_that_there_is_not_is_named(saved, task, family, message):
    with pytest.raises(ConfigError, match=message):
        finetune_recipe(task, saved(family), {})


def test_a_folder_of_other_content_is_named(tmp_path):
    with pytest.raises(ConfigError, match="--from: folder: expected config.json"):
        finetune_recipe("vqa", tmp_path, {})


def test_lora_trains_few_parameters_of_a_downstream_model(saved):
    assert "albef" in CONFIGS
    _, result = run(saved, "albef", "vqa", **{"peft.kind": "lora", "peft.r": 2})
    model = result.model
    moved = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved and all("lora" in name or "head" in name or "temp" in name for name in moved)
