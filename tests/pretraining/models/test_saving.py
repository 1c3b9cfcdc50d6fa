"""A reduced model is saved and loaded by its library, and stays the same model."""

import copy
import json

import open_clip
import pytest
import torch
import transformers
from safetensors.torch import save_file

import elip_models
from elip_models.api import is_reduced
from tests.helpers.models import hf_clip, ids
from tests.helpers.models import output_of_pair as run
from tests.helpers.towers import SCHEDULE, WIDTH, images

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {
        "layers": 6,
        "width": WIDTH,
        "head_width": 16,
        "image_size": 48,
        "patch_size": 8,
    },
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 24, "heads": 2, "layers": 2},
}


def pair():
    return open_clip.CLIP(**CONFIG, output_dict=True).eval()


def reduced(model):
    return elip_models.reduce_(model, schedule=SCHEDULE, scorer="exact")


@pytest.fixture
def model():
    """Return a reduced model after a forward in training mode without backward."""
    model = reduced(pair())
    model.train()(images(4), ids(4))
    return model.eval()


def features(model):
    torch.manual_seed(3)
    with torch.no_grad():
        return run(model, images(), ids())


def assert_same(other, model):
    """Check that `other` has the features of the reduced `model`, reduced and dense."""
    expected = features(model)
    if is_reduced(other):
        assert torch.equal(features(other), expected)
    dense = features(elip_models.unreduce_(other))
    assert not torch.allclose(dense, expected)
    assert torch.equal(features(reduced(other)), expected)
    assert torch.equal(features(model), expected)  # `other` is another model
    assert torch.equal(features(elip_models.unreduce_(model)), dense)


def save(model, path):
    """Save as the training script of open_clip, with prefixes; or as a plain state dict."""
    state = model.state_dict()
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        wrapped = {f"module.{name}": value for name, value in state.items()}
        torch.save({"epoch": 1, "name": "tiny", "state_dict": wrapped}, path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("make", [pair, lambda: reduced(pair())], ids=["untouched", "reduced"])
def test_open_clip_loads_the_checkpoint(model, tmp_path, make, suffix):
    path = tmp_path / f"epoch_1{suffix}"
    save(model, path)
    other = make()
    assert not torch.allclose(features(other), features(model))
    keys = open_clip.load_checkpoint(other, str(path))
    assert not keys.missing_keys and not keys.unexpected_keys
    assert_same(other, model)


@pytest.mark.parametrize("how", ["pretrained", "local-dir"])
def test_open_clip_creates_a_model_from_the_checkpoint(model, tmp_path, how, monkeypatch):
    save(model, tmp_path / "open_clip_pytorch_model.bin")
    if how == "pretrained":
        monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {"tiny": CONFIG})
        arguments = {"pretrained": str(tmp_path / "open_clip_pytorch_model.bin")}
        other = open_clip.create_model("tiny", output_dict=True, **arguments)
    else:
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
        other = open_clip.create_model(f"local-dir:{tmp_path}", output_dict=True)
    assert_same(other.eval(), model)


@pytest.mark.parametrize("make", [pair, lambda: reduced(pair())], ids=["untouched", "reduced"])
def test_a_dense_checkpoint_loads_into_either_model(make, tmp_path):
    """Load a checkpoint that was trained without `reduce_`."""
    dense, other = pair(), make()
    torch.save(dense.state_dict(), tmp_path / "dense.pt")
    other.load_state_dict(torch.load(tmp_path / "dense.pt"))
    expected = features(dense)
    assert_same(other, reduced(dense))
    assert torch.equal(features(dense), expected)


def test_a_whole_saved_model_is_reduced_until_it_is_not(model, tmp_path):
    torch.save(model, tmp_path / "model.pt")
    other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert is_reduced(other)
    assert_same(other, model)


def test_a_deepcopy_is_reduced_until_it_is_not(model):
    other = copy.deepcopy(model)
    assert is_reduced(other)
    assert_same(other, model)


def test_transformers_saves_and_loads(tmp_path):
    model = reduced(hf_clip().eval())
    model.save_pretrained(tmp_path)
    other = transformers.CLIPModel.from_pretrained(tmp_path, local_files_only=True).eval()
    assert not is_reduced(other)
    assert_same(other, model)
