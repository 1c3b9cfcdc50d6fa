"""ALBEF, BLIP and METER through `elip train`: falling losses, exact resuming, errors."""

import math
import shutil

import pytest
import torch
from transformers import BertConfig, BertModel

from elip_models.pretraining.data import load_tokenizer
from elip_models.pretraining.models.registry import create_model, load_model
from elip_models.pretraining.training.run_folder import RunFolder
from elip_models.pretraining.training.trainer import train
from elip_models.validation import ConfigError
from tests.helpers.tiers import tiered
from tests.helpers.tiny_run import logged, own_process, tiny_config
from tests.helpers.weights import assert_equal_weights

RECIPES = ("albef_tiny", "blip_tiny", "meter_tiny")
LOSSES = {
    "albef_tiny": ("loss", "loss_itc", "loss_itm", "loss_mlm"),
    "blip_tiny": ("loss", "loss_itc", "loss_itm", "loss_lm"),
    "meter_tiny": ("loss", "loss_mlm", "loss_itm"),
}


@pytest.fixture(autouse=True)
def _own_process():
    with own_process():
        yield


def config(folder, recipe, *overrides):
    evaluated = () if recipe == "meter_tiny" else ("report=[retrieval]",)
    return tiny_config(folder, *evaluated, *overrides, recipe=recipe)


def assert_all_losses_fall(folder, recipe):
    rows = logged(folder, *LOSSES[recipe])
    tenth = len(rows) // 10
    for name in LOSSES[recipe]:
        first, last = (sum(row[name] for row in part) for part in (rows[:tenth], rows[-tenth:]))
        assert last < first, name


@pytest.mark.exhaustive
@pytest.mark.parametrize("recipe", RECIPES)
def test_all_losses_fall(recipe, tmp_path):
    result = train(
        config(
            tmp_path,
            recipe,
            "data.train=emoji_scenes:size=200",
            "optim.batch_size=16",
            "optim.steps=200",
            "optim.warmup_steps=10",
        )
    )
    assert_all_losses_fall(tmp_path, recipe)
    if "loss_itc" in LOSSES[recipe]:  # well below what features that say nothing have
        last = [row["loss_itc"] for row in logged(tmp_path, "loss_itc")][-20:]
        assert sum(last) / 20 < math.log(16 + result.model.config.queue_size) - 0.2
    other = load_model(tmp_path / "model")
    assert_equal_weights(other, result.model)
    assert len(load_tokenizer(tmp_path / "model")) == other.config.vocab_size


@pytest.mark.parametrize("recipe", tiered(reversed(RECIPES), [], slow=["meter_tiny"]))
def test_shards_train_too(recipe, tmp_path, scene_files):
    shards = scene_files / "train-000{0..3}.tar"
    sizes = ("optim.batch_size=16", "optim.steps=100", "optim.warmup_steps=10")
    train(config(tmp_path, recipe, f"data.train={shards}", "data.vocab_size=600", *sizes))
    assert_all_losses_fall(tmp_path, recipe)


@pytest.mark.parametrize("recipe", tiered(RECIPES, ["albef_tiny"], slow=["blip_tiny"]))
def test_resuming_is_exact_with_queue_momentum_and_random_state(recipe, tmp_path):
    """Resume with dropout, drawn negatives, masked tokens and a queue that wraps around."""
    dropout = "dropout" if recipe == "meter_tiny" else "text_dropout"
    overrides = ("optim.steps=8", "checkpoint_every=5", f"model.overrides.{dropout}=0.1")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(config(whole, recipe, *overrides))
    shutil.copytree(whole, resumed)
    shutil.rmtree(RunFolder(resumed).checkpoints.latest())
    shutil.rmtree(resumed / "model")
    assert RunFolder(resumed).checkpoints.latest().name == "step_00000005"
    train(config(resumed, recipe, *overrides), resume=True)
    assert len(logged(resumed, *LOSSES[recipe])) == 8
    assert logged(resumed, *LOSSES[recipe]) == logged(whole, *LOSSES[recipe])
    one, two = (load_model(folder / "model").state_dict() for folder in (resumed, whole))
    assert all(torch.equal(one[name], weight) for name, weight in two.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", tiered(RECIPES, ["blip_tiny"], slow=["albef_tiny"]))
def test_a_step_does_not_synchronise_with_the_host(name):
    """Run a step on the meta device, which has no values to read."""
    with torch.device("meta"):
        model = create_model(f"elip_{name}")
        images, ids = torch.empty(4, 3, 64, 64), torch.empty(4, 32, dtype=torch.long)
        out = model(images, ids, torch.ones_like(ids))
        out.loss.backward()
    with pytest.raises(RuntimeError, match="meta tensors"):
        out.loss.item()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "recipe", tiered(["albef_tiny", "blip_tiny"], ["albef_tiny"], slow=["blip_tiny"])
)
def test_momentum_targets_are_warmed_up_by_epoch(recipe, tmp_path):
    train(config(tmp_path, recipe, "optim.batch_size=16", "optim.steps=9"))
    epochs = 1.0 if recipe == "albef_tiny" else 2.0
    alpha = [row["alpha"] for row in logged(tmp_path, "alpha")]
    assert alpha == pytest.approx([0.4 * min(1.0, step / 3 / epochs) for step in range(9)])


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("meter_tiny", "report=[retrieval]", "report: expected no retrieval.*METER"),
        ("albef_tiny", "optim.batch_size=32", "model: queue_size: expected at least the batch, 32"),
        ("blip_tiny", "model.overrides.text_width=48", "model: text_width: expected vision_width"),
        ("blip_tiny", "model.overrides.colour=red", "model: config: expected names.*colour"),
        ("albef_tiny", "optim.lr_scale={temprature: 0.1}", "optim: lr_scale: .*temprature"),
        ("albef_tiny", "model.text_init=bert", "model.vision_init, model.text_init: text"),
    ],
)
def test_a_setting_that_does_not_fit_raises(tmp_path, recipe, override, message):
    with pytest.raises(ConfigError, match=message):
        train(config(tmp_path, recipe, override))


def test_text_init_loads_the_text_tower(tmp_path):
    """Load a folder of transformers and compare the model's weights before its first step."""
    bert = BertModel(
        BertConfig(
            vocab_size=300,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
        )
    )
    bert.save_pretrained(tmp_path / "bert")
    settings = (f"model.text_init=hf:{tmp_path / 'bert'}", "optim.lr=1e-30", "optim.steps=1")
    result = train(config(tmp_path / "run", "albef_tiny", *settings))
    word = bert.embeddings.word_embeddings.weight
    ours = result.model.encoders.text.embeddings.word_embeddings.weight
    torch.testing.assert_close(ours[: len(word)], word)


@pytest.mark.parametrize("recipe", tiered(RECIPES, [], slow=["albef_tiny"]))
def test_bf16_with_checkpointing_stays_near_fp32(recipe, tmp_path):
    cheap = ("optim.precision=bf16", "optim.grad_checkpointing=true")
    for name, overrides in (("fp32", ()), ("bf16", cheap)):
        with own_process():
            train(config(tmp_path / name, recipe, "report=[]", *overrides))
    rows = [logged(tmp_path / name, *LOSSES[recipe]) for name in ("fp32", "bf16")]
    assert rows[0] != rows[1]
    for full, half in zip(*rows, strict=True):
        assert half == pytest.approx(full, rel=0.05)
