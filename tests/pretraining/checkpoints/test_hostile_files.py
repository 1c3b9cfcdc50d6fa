"""Checkpoints that are not trusted: every file is read whole or refused by its name."""

import json
import zipfile
from contextlib import contextmanager

import pytest
import torch

from elip_models.pretraining.checkpoints.export import save_as
from elip_models.pretraining.checkpoints.load import convert_checkpoint
from elip_models.pretraining.checkpoints.names import KINDS
from elip_models.pretraining.checkpoints.renaming import rename_tensors, reversed_names
from elip_models.pretraining.checkpoints.warm_start import warm_start_
from elip_models.pretraining.models.registry import create_model
from tests.helpers.weights import assert_equal_weights
from tests.pretraining.checkpoints.test_checkpoints import (
    HEADS,
    saved,
    small_open_clip,
    without_tensor,
)

SIZES = {"vision_width": 32, "vision_heads": 2, "text_width": 32, "text_heads": 2}
TENSORS = {
    "sparse": lambda weight: weight.to_sparse(),
    "csr": lambda weight: weight.to_sparse_csr(),
    "quantised": lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
    "complex": lambda weight: weight.to(torch.complex64),
    "float8": lambda weight: weight.to(torch.float8_e4m3fn),
    "meta": lambda weight: weight.to("meta"),
    "nested": lambda weight: torch.nested.nested_tensor([weight, weight]),
    "infinite": lambda weight: weight.index_fill(0, torch.tensor([1]), -torch.inf),
    "bool": lambda weight: weight.bool(),
    "int8": lambda weight: weight.to(torch.int8),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_without_finite_numbers_is_named(kind, tmp_path):
    weights = small_open_clip()
    weights["visual.proj"] = TENSORS[kind](weights["visual.proj"])
    path = saved(weights, tmp_path)
    for read in (
        lambda: convert_checkpoint(path, **HEADS),
        lambda: warm_start_(create_model("clip_tiny", **SIZES), path),
    ):
        with pytest.raises(ValueError, match=r"visual\.proj|image_projection\.weight"):
            read()


@pytest.mark.parametrize(
    "name",
    [
        "visual.positional_embedding",
        "visual.proj",
        "visual.conv1.weight",
        "token_embedding.weight",
        "transformer.resblocks.0.attn.in_proj_weight",
        "visual.transformer.resblocks.0.mlp.c_fc.weight",
    ],
)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (0, 0, 0)], ids=str)
def test_a_tensor_of_other_dims_raises_for_its_shape(name, shape, tmp_path):
    weights = small_open_clip() | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=r"expected|must be"):
        convert_checkpoint(saved(weights, tmp_path), **HEADS)


def test_a_small_file_of_expanded_tensors_is_refused_before_they_are_copied(tmp_path):
    weights = small_open_clip()
    for name in ("visual.proj", "visual.class_embedding"):
        weights[name] = torch.zeros(1).expand(2**16, 2**16)
    with pytest.raises(ValueError, match=r"at most 4 times the size .* most in visual\."):
        convert_checkpoint(saved(weights, tmp_path), **HEADS)


def test_tied_tensors_are_no_expanded_ones(tmp_path):
    tied = create_model("blip_tiny", **SIZES)
    weights = rename_tensors(tied.state_dict(), reversed_names(KINDS["blip"].names))
    model = convert_checkpoint(saved(weights, tmp_path), **without_tensor(tied.config, "blip"))
    assert_equal_weights(model, tied)


def test_sizes_of_a_few_tensors_are_compared_before_the_model_is_allocated(tmp_path):
    weights = small_open_clip() | {"visual.positional_embedding": torch.zeros(2, 2**20)}
    with pytest.raises(ValueError, match="expected shape: "):
        convert_checkpoint(saved(weights, tmp_path), vision_heads=16, text_heads=2)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_pickle_that_allocates_is_refused(compression, tmp_path):
    path = saved({"a": torch.zeros(1)}, tmp_path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    members[pickled] = b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x7f\x85R."
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"checkpoint\.pth, got a bytearray|uncompressed"):
        convert_checkpoint(path)


@pytest.mark.parametrize("pickled", [b"\x80\x02K\x01Q.", b"\x80\x02}K\x01b.", b".", b""])
def test_a_forged_pickle_is_named(pickled, tmp_path):
    path = tmp_path / "checkpoint.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    with pytest.raises(ValueError, match=r"checkpoint\.pth, got a damaged file"):
        convert_checkpoint(path)


@pytest.mark.parametrize("key", [1, None, (1, 2), b"a"], ids=str)
def test_names_that_are_no_texts_are_refused(key, tmp_path):
    path = saved(small_open_clip() | {key: torch.zeros(1)}, tmp_path)
    with pytest.raises(ValueError, match=rf"a key of type {type(key).__name__}"):
        convert_checkpoint(path, **HEADS)


def test_a_tensor_that_is_there_twice_is_refused(tmp_path):
    weights = small_open_clip()
    weights["_orig_mod.visual.proj"] = weights["visual.proj"] + 1
    with pytest.raises(ValueError, match="expected each tensor once"):
        convert_checkpoint(saved(weights, tmp_path), **HEADS)


@pytest.mark.parametrize("layer", ["9" * 5000, "1000000000000", "1023"])
def test_a_layer_of_a_huge_number_is_refused(layer, tmp_path):
    name = f"visual.transformer.resblocks.{layer}.ln_1.weight"
    weights = small_open_clip() | {name: torch.zeros(48)}
    with pytest.raises(ValueError, match=r"unexpected|vision_depth|expected at most"):
        convert_checkpoint(saved(weights, tmp_path), **HEADS)


OPEN_CLIP = {
    "width": ("model_cfg", "vision_cfg", "width"),
    "head_width": ("model_cfg", "vision_cfg", "head_width"),
    "vision_cfg": ("model_cfg", "vision_cfg"),
    "text_cfg": ("model_cfg", "text_cfg"),
    "pad_id": ("model_cfg", "text_cfg", "pad_id"),
    "mean": ("preprocess_cfg", "mean"),
    "preprocess_cfg": ("preprocess_cfg",),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return folders of tiny models for open_clip and for transformers."""
    folder, model = (
        tmp_path_factory.mktemp("exported"),
        create_model("clip_tiny", **SIZES, eos_token_id=9),
    )
    return {to: save_as(model, folder / to, to) for to in ("open_clip", "hf")}


@contextmanager
def _with_value(path, keys, value):
    """Inside, the JSON of `path` has another value."""
    before = path.read_text()
    content = holder = json.loads(before)
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = value
    path.write_text(json.dumps(content))
    try:
        yield
    finally:
        path.write_text(before)


@pytest.mark.parametrize("value", ["a", 3.5, ["b"]], ids=str)
@pytest.mark.parametrize("name", OPEN_CLIP)
def test_a_value_of_another_kind_in_a_config_of_open_clip_is_named(exported, name, value):
    keys = OPEN_CLIP[name]
    folder, said = exported["open_clip"], rf"source: expected .*{name}.* open_clip_config"
    with (
        _with_value(folder / "open_clip_config.json", keys, value),
        pytest.raises(ValueError, match=said),
    ):
        convert_checkpoint(folder)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("vision_config",), 3),
        (("vision_config", "hidden_act"), 3),
        (("text_config", "num_attention_heads"), "a"),
        (("vision_config", "layer_norm_eps"), "a"),
        (("model_type",), ["a"]),
    ],
)
def test_a_value_of_another_kind_in_a_config_of_transformers_is_named(exported, keys, value):
    folder, said = exported["hf"], r"source: expected .*config\.json"
    with _with_value(folder / "config.json", keys, value), pytest.raises(ValueError, match=said):
        convert_checkpoint(folder)


def test_a_family_that_is_no_text_names_the_file(tmp_path):
    (tmp_path / "config.json").write_text('{"model": ["clip"]}')
    torch.save(small_open_clip(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"config\.json: model: expected a text"):
        convert_checkpoint(tmp_path)
