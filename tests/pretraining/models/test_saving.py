"""A reduced model is saved and loaded by its library, and stays the same model."""

import copy
import json
from functools import partial

import open_clip
import pytest
import torch
import transformers
from safetensors.torch import save_file

import elip_models
from elip_models.api import is_reduced
from tests.helpers.models import hf_clip, ids
from tests.helpers.models import output_of_pair as run
from tests.helpers.own_warnings import UNGUIDED
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


def loaded(model, folder, make, suffix):
    """Save as open_clip's training script or as a plain state dict, and load into another model."""
    path, other, state = folder / f"epoch_1{suffix}", make(), model.state_dict()
    if suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save({"state_dict": {f"module.{name}": w for name, w in state.items()}}, path)
    assert not torch.allclose(features(other), features(model))
    keys = open_clip.load_checkpoint(other, str(path))
    assert not keys.missing_keys and not keys.unexpected_keys
    return other


def created(model, folder):
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
    return open_clip.create_model(f"local-dir:{folder}", output_dict=True).eval()


def pickled(model, folder):
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


MAKERS = {"untouched": pair, "reduced": lambda: reduced(pair())}
WAYS = {
    **{
        f"{suffix}, {name}": partial(loaded, make=make, suffix=suffix)
        for suffix in (".pt", ".safetensors")
        for name, make in MAKERS.items()
    },
    "local-dir, untouched": created,
    "pickle, reduced": pickled,
    "deepcopy, reduced": lambda model, folder: copy.deepcopy(model),
}


@UNGUIDED
@pytest.mark.parametrize("way", WAYS)
def test_a_saved_or_copied_model_is_the_same_model(way, model, tmp_path):
    other = WAYS[way](model, tmp_path)
    assert is_reduced(other) == way.endswith(", reduced")
    assert_same(other, model)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_dense_checkpoint_loads_into_either_model(make, tmp_path):
    """Load a checkpoint that was trained without `reduce_`."""
    dense, other = pair(), make()
    torch.save(dense.state_dict(), tmp_path / "dense.pt")
    other.load_state_dict(torch.load(tmp_path / "dense.pt"))
    expected = features(dense)
    assert_same(other, reduced(dense))
    assert torch.equal(features(dense), expected)


def test_transformers_saves_and_loads(tmp_path):
    model = reduced(hf_clip().eval())
    model.save_pretrained(tmp_path)
    other = transformers.CLIPModel.from_pretrained(tmp_path, local_files_only=True).eval()
    assert not is_reduced(other)
    assert_same(other, model)
