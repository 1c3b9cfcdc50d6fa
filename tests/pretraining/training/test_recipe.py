"""Recipes: defaults, overrides and error messages."""

import dataclasses

import pytest

from elip_models.pretraining.training.recipe import (
    FINETUNE,
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


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("optim.lr=3e-4", "optim", "lr", 3e-4),
        ("optim.lr=1", "optim", "lr", 1.0),
        ("optim.betas=[0.8, 0.9]", "optim", "betas", (0.8, 0.9)),
        ("optim.lr_scale={temperature: 5e-2}", "optim", "lr_scale", {"temperature": 0.05}),
        ("optim.max_grad_norm=null", "optim", "max_grad_norm", None),
        ("optim.epochs=1.5", "optim", "epochs", 1.5),
        ("optim.precision=bf16", "optim", "precision", "bf16"),
        ("data.train=*.tar", "data", "train", "*.tar"),
        ("data.train=a-{0000..0003}.tar", "data", "train", "a-{0000..0003}.tar"),
        ("data.train=['a.json', '*.tar']", "data", "train", ("a.json", "*.tar")),
        ("optim.no_decay=[]", "optim", "no_decay", ()),
        ("data.train=emoji_scenes:seed=3,size=5", "data", "train", "emoji_scenes:seed=3,size=5"),
        ("model.overrides.drop_path=0.1", "model", "overrides", {"drop_path": 0.1}),
        ("model.overrides={schedule: null}", "model", "overrides", {"schedule": None}),
    ],
)
def test_override(recipe, override, section, field, value):
    assert getattr(getattr(load_recipe(recipe, [override]), section), field) == value


def test_later_override_wins(recipe):
    assert load_recipe(recipe, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optim.weight_decy=1",
            "lr_scale, weight_decay, no_decay, betas, eps, max_grad_norm, max_nonfinite_steps, "
            "precision, grad_checkpointing, batch_slices, compile, ema, gather, shard; "
            "did you mean 'optim.weight_decay'?",
        ),
        ("lr=1", "lr: no such key; a recipe has name, output_dir, model"),
        ("lr=1", "; did you mean 'optim.lr'?"),
        ("optm.lr=1", "; did you mean 'optim'?"),
        ("optim.lr=fast", "optim.lr: expected a number above 0, got 'fast'"),
        ("optim.lr=0", "optim.lr: expected a number above 0, got 0"),
        ("optim.lr=.nan", "optim.lr: expected a number above 0, got nan"),
        ("optim.lr=.inf", "optim.lr: expected a number above 0, got inf"),
        ("optim.lr=true", "optim.lr: expected a number above 0, got True"),
        ("optim.lr=null", "optim.lr: expected a number above 0, got None"),
        ("optim.lr.peak=1", "optim.lr.peak: expected optim.lr to be a section, got '1e-3'"),
        ("optim=1", "optim: expected a section of keys, got 1"),
        ("optim.steps=1.5", "optim.steps: expected an integer at least 1 or null, got 1.5"),
        ("optim.steps=null", "optim.steps: expected it or optim.epochs to be set, got neither"),
        ("optim.batch_size=0", "optim.batch_size: expected an integer at least 1, got 0"),
        ("optim.batch_size=yes", "optim.batch_size: expected an integer at least 1, got True"),
        ("optim.warmup_steps=-1", "optim.warmup_steps: expected an integer at least 0, got -1"),
        ("optim.betas=[0.9]", r"optim.betas: expected [a number in [0, 1), a number in [0, 1)]"),
        ("optim.betas=[0.9, 1]", "got [0.9, 1]"),
        ("optim.precision=fp8", "precision: expected one of 'fp32', 'bf16', 'fp16', got 'fp8'"),
        ("optim.grad_checkpointing=1", "grad_checkpointing: expected true or false, got 1"),
        (
            "optim.lr_scale={temperature: 0}",
            "optim.lr_scale: expected a mapping, each a number above 0, got {'temperature': 0}",
        ),
        ("data.max_bad_share=2", "data.max_bad_share: expected a number in [0, 1], got 2"),
        (
            "data.train=3",
            "data.train: expected a string or a mapping or a list, each a string, got 3",
        ),
        ("data.train=???", "a list, each a string, got ???; set data.train=VALUE"),
        ("data.train=[a.json,*.tar]", "put its items in quotes, such as data.train=['a.json', '*"),
        ("data.weights=[1, 2]", "data.weights: expected one for each of the 1 sources of data.tr"),
        ("data.weights=[0]", "data.weights: expected null or a list, each a number above 0, got"),
        ("data.captions=clip", "'blip', 'blip_question' or null, got 'clip'"),
        ("data.resize=pad", "data.resize: expected one of 'crop', 'squash' or null, got 'pad'"),
        ("optim.warmup_lr=1", "optim.warmup_lr: expected at most optim.lr = 0.001, got 1.0"),
        ("model.overrides=3", "model.overrides: expected a mapping, got 3"),
        ("trackers=tensorboard", "trackers: expected a list, each a string, got 'tensorboard'"),
        ("report=[poem]", "report: expected a list, each one of 'retrieval', 'zero_shot', "),
        ("report=[picture]", "data.eval: expected a source"),
        ("eval_every=5", "data.eval: expected a source"),
        ("seed", "override 'seed': expected key=value"),
    ],
)
def test_mistake_names_key_expected_and_got(recipe, override, message):
    with pytest.raises(ConfigError) as error:
        load_recipe(recipe, [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    "overrides", [["report=[timing]"], ["report=[picture, retrieval]"], ["data.zero_shot=images"]]
)
def test_report_options_that_a_task_lacks_raise(recipe, overrides):
    with pytest.raises(ConfigError, match=r"report, data.zero_shot: expected .* the task vqa"):
        load_recipe(recipe, ["task=vqa", "data.eval=a.json", *overrides])
    load_recipe(recipe, ["task=vqa", "data.eval=a.json", "report=[picture]"])


@pytest.mark.parametrize("key", ["data.validation=a.json", "eval.select=accuracy"])
def test_a_selection_in_pre_training_raises(recipe, key):
    with pytest.raises(
        ConfigError, match=r"^eval\.select, data\.validation: expected null in pre-"
    ):
        load_recipe(recipe, [key])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "expected a mapping of keys, got list"),
        ("a: [", "not valid YAML"),
        ("name: test", "output_dir: expected a string, got nothing"),
        (MINIMAL.replace("lr: 1e-3", "eps: 1"), "optim.lr: expected a number above 0, got nothing"),
    ],
)
def test_a_file_that_is_not_a_recipe_raises(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_recipe(path)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["clip_tny", "missing/recipe.yaml"])
def test_missing_recipe(name):
    with pytest.raises(ConfigError, match=name):
        load_recipe(name)


@pytest.mark.parametrize("name", recipe_names())
def test_built_in_recipe_loads_and_survives_a_round_trip(tmp_path, name):
    config = load_recipe(name, ["data.train=a.json"])
    save_recipe(config, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == config


@pytest.mark.parametrize("name", ["clip_vit_s16_cc3m", "clip_vit_b16_cc12m"])
def test_a_recipe_without_built_in_data_requires_data_train(name):
    with pytest.raises(ConfigError, match=r"data\.train: .* set data\.train=VALUE"):
        load_recipe(name)


def test_overrides_in_one_text_raise(recipe):
    with pytest.raises(ConfigError, match="overrides: expected a list of"):
        load_recipe(recipe, "seed=1")


def test_config_is_frozen(recipe):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_recipe(recipe).seed = 1


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
    given = ["data.train=a", "data.eval=b", "model.pretrained=c", "data.validation=d"]
    own, base = (load_recipe(each, given) for each in (path, "finetune/retrieval_albef_elip"))
    optim = dataclasses.replace(base.optim, lr=1e-3)
    assert own == dataclasses.replace(base, name="own", optim=optim)
    assert own.model.overrides["queue_size"] == 65536  # of the base of the base


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("3", "base: expected the name of a recipe, got 3"),
        ("albef_4n", "recipe 'albef_4n': expected .*did you mean 'albef_4m'"),
        ("own.yaml", "base: expected at most 7 recipes in a row"),
    ],
)
def test_a_base_that_is_no_recipe_raises(tmp_path, monkeypatch, base, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(f"base: {base}")
    with pytest.raises(ConfigError, match=message):
        load_recipe("own.yaml")


def of_finetune(name):
    given = ["data.train=a", "data.eval=b", "model.pretrained=c", "data.validation=d"]
    return load_recipe(f"{FINETUNE}/{name}", given)


@pytest.mark.parametrize(
    ("name", "batch", "epochs", "candidates"),
    [
        ("retrieval_albef", 16, 5, 256),
        ("retrieval_albef_flickr", 16, 5, 128),
        ("entailment_albef", 16, 3, None),
        ("vqa_albef", 16, 8, None),
        ("nlvr2_albef", 8, 10, None),
        ("retrieval_blip", 16, 3, 256),
        ("retrieval_blip_flickr", 16, 5, 128),
        ("captioning_blip", 16, 6, None),
    ],
)
def test_the_values_of_elip_differ_in_batch_epochs_and_selection_only(
    name, batch, epochs, candidates
):
    elip, original = of_finetune(f"{name}_elip"), of_finetune(name)
    assert (elip.optim.batch_size, elip.optim.epochs) == (batch, epochs)
    assert elip.task_options.get("candidates") == candidates
    selects = name.startswith(("entailment", "nlvr2"))
    assert elip.eval.select == (original.eval.select if selects else None)
    changed = {"optim.batch_size", "optim.epochs", "eval.select", "name", "output_dir"}
    assert original.optim.batch_size == 2 * batch
    assert not resume_conflicts(original, elip, may_change=changed)
