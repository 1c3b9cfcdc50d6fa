"""Options of training: initial weights, and compilation."""

import io
import shutil

import pytest
import torch
from rich.console import Console
from torch._dynamo.utils import counters

from elip_models.pretraining.models.clip.model import CLIP
from elip_models.pretraining.models.registry import load_model
from elip_models.pretraining.training.run_folder import RunFolder
from elip_models.pretraining.training.trainer import train
from elip_models.validation import ConfigError
from tests.helpers.tiny_run import logged, own_process, tiny_config


def losses(folder):
    return [row["loss"] for row in logged(folder, "loss")]


def train_resumed(folder, *overrides, **options):
    """Train for six steps, and resume another run after four; return both models' weights."""
    whole, resumed = folder / "whole", folder / "resumed"
    settings = ("optim.steps=6", "checkpoint_every=4", *overrides)
    train(tiny_config(whole, *settings, **options))
    shutil.copytree(whole, resumed)
    shutil.rmtree(RunFolder(resumed).checkpoints.latest())
    shutil.rmtree(resumed / "model")
    assert RunFolder(resumed).checkpoints.latest().name == "step_00000004"
    train(tiny_config(resumed, *settings, **options), resume=True)
    assert losses(resumed) == losses(whole)
    return [load_model(run / "model").state_dict() for run in (whole, resumed)]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(other[name], weight), name


RESUMED = [  # compiled, dropout, drawn negatives, masks, and a queue that wraps
    ("clip_tiny", ("optim.compile=aot_eager",)),
    ("blip_tiny", ("model.overrides.text_dropout=0.1",)),
    ("meter_tiny", ("model.overrides.dropout=0.1",)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "options"), RESUMED)
def test_resuming_is_exact(recipe, options, tmp_path):
    assert_same(*train_resumed(tmp_path, *options, recipe=recipe))


@pytest.mark.slow
def test_a_compiled_step_is_recompiled_only_where_patch_dropout_ends(tmp_path):
    dropout = (
        "model.overrides.strategy=patch_dropout",
        "model.overrides.strategy_options={keep_ratio: 0.5, until: 2}",
        "model.overrides.schedule=null",
    )
    for name, compiled in (("plain", "false"), ("compiled", "eager")):
        torch.compiler.reset()
        counters.clear()
        with own_process():
            config = tiny_config(tmp_path / name, f"optim.compile={compiled}", *dropout)
            result = train(config)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert losses(tmp_path / "compiled") == losses(tmp_path / "plain")
    assert type(result.model) is CLIP


def saved_run(folder):
    train(tiny_config(folder, "model.overrides.schedule=null"))
    return folder / "model"


@pytest.mark.slow
def test_a_warm_start_is_not_repeated_on_resuming(tmp_path):
    source = saved_run(tmp_path / "first")
    tokenizer = shutil.copytree(source, tmp_path / "tokenizer")
    begins = (f"model.pretrained={source}", f"data.tokenizer={tokenizer}", "optim.lr=1e-30")
    console = Console(file=io.StringIO(), width=200)
    second = tmp_path / "second"
    train(tiny_config(second, *begins), console=console)
    assert_same(load_model(source).state_dict(), load_model(second / "model").state_dict())
    assert f"pretrained: {source}\n  loaded        " in console.file.getvalue()
    shutil.rmtree(source)
    with pytest.raises(ConfigError, match=r"model\.pretrained: .*got none at"):
        train(tiny_config(tmp_path / "third", *begins))
    assert train(tiny_config(second, *begins, "optim.steps=5"), resume=True).step == 5


@pytest.mark.slow
def test_embeddings_of_another_tokenizer_raise(tmp_path):
    source = saved_run(tmp_path / "first")
    begins = f"model.pretrained={source}"
    with pytest.raises(ConfigError, match=r"data\.tokenizer: expected that of model\.pretrained"):
        train(tiny_config(tmp_path / "second", begins))
    tokens = "['*.token_embedding.weight']"
    new = (f"model.allow_missing={tokens}", f"model.allow_unexpected={tokens}")
    assert train(tiny_config(tmp_path / "third", begins, *new)).step == 4


def test_pretrained_with_another_initialisation_raises(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.pretrained: must be null with model\.vision_"):
        tiny_config(tmp_path, "model.pretrained=a", "model.vision_init=timm:b")
