"""A reduced model is freed with its last reference, without the garbage collector."""

import copy
import gc
import pickle
from weakref import ref

import pytest
import torch

import elip_models
from tests.helpers.models import hf_blip, hf_vision, open_clip_pair
from tests.helpers.own_warnings import UNGUIDED
from tests.helpers.towers import images, plain_vit
from tests.vlm.models import build

MODELS = {
    "timm": plain_vit,
    "open_clip": open_clip_pair,
    "transformers": lambda: hf_vision("ViTForImageClassification", "ViTConfig", num_labels=5),
    "transformers pair": hf_blip,
}


@pytest.fixture
def no_gc():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@UNGUIDED
@pytest.mark.parametrize("strategy", ["tome", "elip", "resize"])
@pytest.mark.parametrize("name", MODELS)
def test_model_is_freed_without_the_garbage_collector(no_gc, name, strategy):
    model = MODELS[name]()
    if strategy == "elip" and name == "transformers pair":
        strategy = "evit"
    gone = ref(elip_models.reduce_(model, strategy).train())
    tower = getattr(model, "visual", getattr(model, "vision_model", model))
    output = tower(images())
    output = output if isinstance(output, torch.Tensor) else output[0]
    output.sum().backward()
    del model, tower, output
    assert gone() is None


@pytest.mark.parametrize("strategies", [["diverse"], ["visionzip", "fastv"], ["tome", "pyramid"]])
def test_language_model_is_freed_without_the_garbage_collector(no_gc, strategies):
    model, inputs = build("llava")
    for strategy in strategies:
        elip_models.reduce_(model, strategy)
    with torch.no_grad():
        model(**inputs)
    gone = ref(model)
    del model
    assert gone() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copy_reduces_without_its_original_and_is_freed_too(no_gc, copied):
    model, x = elip_models.reduce_(plain_vit(), "tome"), images()
    expected, same = model(x), copied(model)
    del model
    assert torch.equal(same(x), expected)
    assert str(elip_models.reduction_summary(same)) in str(elip_models.reduction_summary(same))
    gone = ref(same)
    del same
    assert gone() is None


def test_image_tower_reduces_when_the_model_around_it_is_gone(no_gc):
    whole, x = elip_models.reduce_(open_clip_pair(), "tome").eval(), images()
    tower, expected = whole.visual, whole.encode_image(x)
    del whole
    assert torch.equal(tower(x), expected)
    assert torch.equal(copy.deepcopy(tower)(x), expected)
    classifier = elip_models.reduce_(MODELS["transformers"](), "tome").eval()
    trunk, expected = classifier.vit, classifier.vit(x)[0]
    del classifier
    assert torch.equal(trunk(x)[0], expected)
    assert not elip_models.is_reduced(elip_models.unreduce_(trunk))
