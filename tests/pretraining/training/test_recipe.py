"""Recipes: defaults, overrides, `base:`, and errors that name the key and what to do."""

import dataclasses

import pytest

from elip_models.pretraining.training.recipe import (
    load_recipe,
    recipe_names,
    resume_conflicts,
    save_recipe,
)
from elip_models.validation import ConfigError

MINIMAL = """
name: test
output_dir: runs/test
model: {name: clip_tiny}
data: {train: "emoji_scenes:size=10"}
optim: {batch_size: 4, steps: 10, lr: 1e-3}
"""
DATA = ["data.train=a", "data.eval=b", "model.pretrained=c", "data.validation=d"]


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


def test_reads_a_file_and_fills_the_defaults(recipe):
    config = load_recipe(recipe)
    assert config.optim.lr == 1e-3  # YAML 1.1 reads 1e-3 as text
    assert config.optim.betas == (0.9, 0.98)
    assert config.data.tokenizer == "train"
    assert config.data.eval is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("optim.lr=3e-4", "optim", "lr", 3e-4),
        ("optim.lr_scale={temperature: 5e-2}", "optim", "lr_scale", {"temperature": 0.05}),
        ("optim.max_grad_norm=null", "optim", "max_grad_norm", None),
        ("optim.no_decay=[]", "optim", "no_decay", ()),
        ("data.train=a-{0000..0003}.tar", "data", "train", "a-{0000..0003}.tar"),
        ("data.train=['a.json', '*.tar']", "data", "train", ("a.json", "*.tar")),
        ("data.train=2024-01-01", "data", "train", "2024-01-01"),
        ("model.overrides={schedule: null}", "model", "overrides", {"schedule": None}),
    ],
)
def test_override(recipe, override, section, field, value):
    assert getattr(getattr(load_recipe(recipe, [override]), section), field) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "optim.lrr: unknown key; did you mean 'optim.lr'?"),
        ("lr=1", "lr: unknown key; did you mean 'optim.lr'?"),
        ("optim.lr=-1", "optim.lr: must be greater than 0, got -1"),
        ("optim.lr=.nan", "optim.lr: must be a finite number, got nan"),
        ("optim.lr=true", "optim.lr: must be a valid number, got True"),
        ("optim.lr.peak=1", "optim.lr.peak: expected lr to be a section, got 0.001"),
        ("optim=1", "optim: must be an object, got 1"),
        ("optim.steps=null", "optim.steps: expected it or optim.epochs to be set, got neither"),
        ("optim.batch_slices=5", "optim.batch_slices: must be at most optim.batch_size = 4, got 5"),
        ("optim.betas=[0.9, 1]", "optim.betas.1: must be less than 1, got 1"),
        ("optim.precision=fp8", "optim.precision: must be 'fp32', 'bf16' or 'fp16', got 'fp8'"),
        ("peft={kind: lora, r: 0}", "peft.r: expected an integer at least 1, got 0"),
        ("data.train=3", "data.train: must be a valid string or must be an object or must be a"),
        ("data.train=???", "data.train: required; set data.train=VALUE"),
        ("data.weights=[1, 2]", "data.weights: expected one for each of the 1 sources of data.tr"),
        ("trackers=tensorboard", "trackers: must be a valid array, got 'tensorboard'"),
        ("report=[poem]", "report.0: must be 'retrieval', 'zero_shot', 'timing' or 'picture', got"),
        ("eval_every=5", "data.eval: expected a source"),
        ("data.validation=a.json", "eval.select, data.validation: expected null in pre-training"),
        ("seed", "override 'seed': expected key=value"),
    ],
)
def test_mistake_names_key_requirement_and_value(recipe, override, message):
    with pytest.raises(ConfigError) as error:
        load_recipe(recipe, [override])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "expected a mapping of keys, got list"),
        ("a: 1\nb: {c: 1, c: 2}", "line 2: key 'c' occurs twice"),
        ("a: &a [*a]", "not valid YAML: Circular reference"),
        ("a: " + "[" * 100_000, "not valid YAML: maximum recursion depth"),
        ("seed: !!python/object/apply:os.system [a]", "could not determine a constructor"),
        ("name: test", "output_dir: required; set output_dir=VALUE"),
        (MINIMAL.replace("lr: 1e-3", "eps: 1"), "optim.lr: required; set optim.lr=VALUE"),
        ("base: 3", "base: expected the name of a recipe, got 3"),
        ("base: clip_vit_s16_cc3m", "data.train: required; set data.train=VALUE"),
        ("base: missing.yaml", "recipe missing.yaml: no such file"),
        ("base: albef_4n", "recipe 'albef_4n': expected a path ending in .yaml, or a name that"),
        ("base: own.yaml", "base: expected at most 7 recipes in a row"),
    ],
)
def test_a_file_that_is_not_a_recipe_raises(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_recipe("own.yaml")
    assert message in str(error.value)


@pytest.mark.parametrize("name", recipe_names())
def test_built_in_recipe_loads_and_survives_a_round_trip(tmp_path, name):
    config = load_recipe(name, ["data.train=a.json"])
    save_recipe(config, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == config


def test_resuming_may_change_length_and_output_only(recipe):
    saved = load_recipe(recipe)
    longer = load_recipe(recipe, ["optim.steps=20", "output_dir=elsewhere", "log_every=1"])
    other = load_recipe(recipe, ["optim.lr=1", "model.overrides.drop_path=0.1", "optim.steps=20"])
    assert resume_conflicts(saved, longer) == []
    changed = [conflict.partition(":")[0] for conflict in resume_conflicts(saved, other)]
    assert changed == ["model.overrides", "optim.lr", "model.overrides.drop_path"]


def test_a_recipe_inherits_from_its_base(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("base: finetune/retrieval_albef_elip\nname: own\noptim: {lr: 1e-3}")
    own, base = (load_recipe(name, DATA) for name in (path, "finetune/retrieval_albef_elip"))
    optim = dataclasses.replace(base.optim, lr=1e-3)
    assert own == dataclasses.replace(base, name="own", optim=optim)
    assert own.model.overrides["queue_size"] == 65536  # of the base of the base
