"""A reduced model is saved and loaded with its reduction; errors name the reason and the remedy."""

import copy
import json
from dataclasses import dataclass

import open_clip
import pytest
import timm
import torch
import torch.distributed as dist
import transformers
from accelerate.utils import extract_model_from_parallel
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard

import elip_models
from elip_models import (
    ELIP,
    PatchDropout,
    RandomPruning,
    Schedule,
    ToMe,
    is_reduced,
)
from elip_models.pretraining.models.registry import create_model
from elip_models.saving.saved_reduced import SETTINGS
from elip_models.strategies.dense import Dense
from elip_models.strategies.serialization import settings_of, strategy_of
from elip_models.towers import as_tower
from elip_models.validation import ConfigError
from tests.helpers.models import hf_clip, hf_vision, ids, output, output_of_pair
from tests.helpers.own_warnings import UNGUIDED
from tests.helpers.towers import SCHEDULE, images, plain_vit
from tests.pretraining.models.test_saving import CONFIG, pair
from tests.strategies.test_strategies import STRATEGIES as CASES

VIT = {"img_size": 48, "patch_size": 8, "depth": 6, "num_classes": 5}


def timm_vit():
    return timm.create_model("vit_tiny_patch16_224", **VIT)


def hf_vit():
    return hf_vision("ViTForImageClassification", "ViTConfig", num_labels=5)


def open_clip_from(folder):
    return open_clip.create_model(f"local-dir:{folder}", output_dict=True)


def hf_from(folder):
    return transformers.CLIPModel.from_pretrained(folder)


LIBRARIES = {  # a model, what its library needs to save it, and how it loads it
    "timm": (timm_vit, None, lambda f: timm.create_model(f"local-dir:{f}", pretrained=True)),
    "open_clip": (pair, CONFIG, open_clip_from),
    "transformers": (hf_clip, None, hf_from),
    "transformers, an image model": (
        hf_vit,
        None,
        transformers.ViTForImageClassification.from_pretrained,
    ),
}


def features(model):
    torch.manual_seed(3)
    x, tokens = images(), ids()
    is_pair = hasattr(model, "visual") or hasattr(model, "text_model")
    if hasattr(model, "output_dict"):
        model.output_dict = True
    with torch.no_grad():
        return output_of_pair(model, x, tokens) if is_pair else output(model, x)


@UNGUIDED
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_reduced_model_is_loaded_reduced_and_by_its_library_dense(library, tmp_path):
    make, config, load = LIBRARIES[library]
    model = make().eval().to(memory_format=torch.channels_last)
    dense = features(model)
    elip_models.reduce_(model, schedule=SCHEDULE, scorer="exact")
    expected = features(model)
    assert not torch.allclose(expected, dense)
    elip_models.save_reduced(model, tmp_path, config=config)
    other = elip_models.load_reduced(tmp_path)
    assert type(other) is type(model)
    given = elip_models.load_reduced(tmp_path, load(tmp_path).eval())
    # other memory formats of equal weights: convolutions may round otherwise
    torch.testing.assert_close(features(other), expected)
    torch.testing.assert_close(features(given), expected)
    torch.testing.assert_close(features(load(tmp_path).eval()), dense)
    weights = model.state_dict()
    assert all(torch.equal(each, weights[name]) for name, each in other.state_dict().items())


def test_our_model_is_loaded_as_its_config_says(tmp_path):
    model = create_model("elip_clip_tiny", scorer="last", count_cls=True).eval()
    elip_models.save_reduced(model, tmp_path)
    for other in (
        elip_models.load_reduced(tmp_path),
        create_model(f"hf:{tmp_path}"),
        create_model("elip_clip_tiny", tmp_path),
    ):
        assert other.config == model.config
        assert torch.equal(other.visual.pos_embed, model.visual.pos_embed)
    with pytest.raises(ValueError, match="strategy: expected None for a CLIP, whose config"):
        elip_models.load_reduced(tmp_path, strategy="tome")


SIZE = as_tower(plain_vit()).size
EVERY = [
    Dense(),
    ELIP(Schedule.parse(SCHEDULE, count_cls=True), scorer=1, fusion=1.0, guidance_norm="match"),
    RandomPruning(Schedule(((2, 1.0), (4, 1 / 3)))),
    PatchDropout(0.3, until=7),
    *(strategy.with_rate(SIZE) for strategy in CASES.values()),
]


@pytest.mark.parametrize("strategy", EVERY, ids=str)
def test_every_strategy_is_the_same_after_json(strategy):
    again = strategy_of(json.loads(json.dumps(settings_of(strategy))))
    assert again == strategy
    assert type(again) is type(strategy)


def saved_timm(folder, strategy=None):
    model = timm_vit()
    elip_models.reduce_(model, strategy=strategy or ToMe(r=3))
    elip_models.save_reduced(model, folder)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version: expected at most 1, .* got 2; upgrade elip-kernels"),
        (
            {"strategy": "tom"},
            "strategy: expected one of .*, got 'tom'; pass an instance of",
        ),
        (
            {"settings": {"rr": 3}},
            "settings.rr: expected keys among r, proportional, .* got 'rr'",
        ),
        ({"settings": {"r": "x"}}, "settings: r: expected .*, got 'x'"),
    ],
)
def test_bad_settings_name_file_and_key(tmp_path, change, message):
    saved_timm(tmp_path)
    path = tmp_path / SETTINGS
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=f"{path}: {message}"):
        elip_models.load_reduced(tmp_path)


@pytest.mark.parametrize("library", ["transformers", "peft"])
def test_a_write_of_the_library_that_fails_leaves_the_old_files(library, tmp_path, monkeypatch):
    def model():
        whole = elip_models.reduce_(hf_vit(), strategy="tome")
        return adapted(whole) if library == "peft" else whole

    if library == "transformers":
        for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
            (tmp_path / name).write_text("of an earlier model in several files")
    elip_models.save_reduced(model(), tmp_path)
    assert len(list(tmp_path.glob("*model*"))) == 1  # the weights
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = model()

    def fail(folder):
        (folder / "config.json").write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(other, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        elip_models.save_reduced(other, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@dataclass(frozen=True)
class Mine(ToMe):
    """A strategy of the user's own."""


def test_a_custom_strategy_must_be_passed_again(tmp_path):
    saved_timm(tmp_path, Mine(r=3))
    with pytest.raises(
        ConfigError, match=r"strategy: expected one of .* got '.*Mine'; pass an instance"
    ):
        elip_models.load_reduced(tmp_path)
    model = elip_models.load_reduced(tmp_path, strategy=Mine(r=3))
    assert model.blocks[1].forward.reduction.strategy == Mine(r=3)


def test_a_model_that_is_not_reduced_is_not_saved_as_reduced(tmp_path):
    with pytest.raises(ValueError, match="model: expected one model of reduce_, got no"):
        elip_models.save_reduced(timm_vit(), tmp_path / "timm")
    with pytest.raises(ValueError, match="expected a reduction in its config, got a dense CLIP"):
        elip_models.save_reduced(create_model("clip_tiny"), tmp_path / "clip")
    several = nn.ModuleList([elip_models.reduce_(timm_vit(), strategy="tome")])
    several.append(elip_models.reduce_(timm_vit(), strategy="tome"))
    with pytest.raises(ValueError, match=r"with 2 of them; pass model\[0\] or model\[1\]"):
        elip_models.save_reduced(several, tmp_path / "several")
    with pytest.raises(TypeError, match=r"expected one of timm, .*, got Sequential"):
        elip_models.save_reduced(nn.Sequential(several[0]), tmp_path / "wrapped")
    assert not any(tmp_path.iterdir())


def test_the_image_tower_inside_is_reduced_again(tmp_path):
    model = pair().eval()
    dense = features(model)
    elip_models.reduce_(model.visual, strategy="tome")
    elip_models.save_reduced(model, tmp_path / "clip", config=CONFIG)
    other = elip_models.load_reduced(tmp_path / "clip")
    assert torch.equal(features(other), features(model))
    assert not torch.equal(features(other), dense)
    assert is_reduced(other.visual)
    model = hf_clip().eval()
    elip_models.reduce_(model.vision_model, strategy="tome")
    elip_models.save_reduced(model, tmp_path / "hf")
    other = elip_models.load_reduced(tmp_path / "hf")
    assert torch.equal(features(other), features(model))


def adapted(model):
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, config).eval()


def test_an_adapter_is_saved_with_the_reduction_and_without_the_model(tmp_path):
    base = hf_vit().eval()
    model = adapted(elip_models.reduce_(copy.deepcopy(base), schedule=SCHEDULE))
    elip_models.save_reduced(model, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    with pytest.raises(ValueError, match="has only an adapter, got None"):
        elip_models.load_reduced(tmp_path)
    other, x = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval(), images()
    assert not torch.allclose(output(other, x), output(model, x))
    elip_models.load_reduced(tmp_path, other)
    assert torch.equal(output(other, x), output(model, x))


def test_wrappers_for_training_are_removed(tmp_path):
    """The order of wrappers is the one of accelerate's `unwrap_model`."""
    model = elip_models.reduce_(timm_vit().eval(), strategy="tome")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager")
        assert extract_model_from_parallel(wrapped, keep_torch_compile=False) is model
        elip_models.save_reduced(wrapped, tmp_path / "model")
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
        with pytest.raises(TypeError, match="model: expected an unsharded model, got"):
            elip_models.save_reduced(model, tmp_path / "sharded")
    finally:
        dist.destroy_process_group()
    assert is_reduced(elip_models.load_reduced(tmp_path / "model"))
    assert not (tmp_path / "sharded").exists()
