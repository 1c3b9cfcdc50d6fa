"""Files of checkpoints: forms that are read, and one line for a file that is no checkpoint."""

import argparse
import json

import pytest
import torch
from safetensors.torch import save_file

from elip_models.pretraining.checkpoints.load import convert_checkpoint
from elip_models.pretraining.checkpoints.weight_files import read_weights
from tests.helpers.weights import assert_equal_weights
from tests.pretraining.checkpoints.test_official import saved
from tests.pretraining.models.test_saving import CONFIG

HEADS = {"vision_heads": 2, "text_heads": 2}


class Surprise:
    """A class whose pickle runs code."""

    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


def small_open_clip(embed_dim=16):
    import open_clip

    return open_clip.CLIP(**CONFIG | {"embed_dim": embed_dim}).state_dict()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": Surprise()}, "global: GLOBAL exec was not an allowed"),
        ({"model": {"a": torch.zeros(1)}, "args": argparse.Namespace()}, r"argparse\.Namespace"),
        ("text", "AttributeError"),
        ({"model": {"b": torch.zeros(1), "a": 1}}, "got other values under 'a'"),
        ({"a": torch.zeros(1), "_orig_mod.a": torch.zeros(1)}, "each tensor once"),
        ({"model": {1: torch.zeros(1)}}, "got other values under '1'"),
        ({}, "got other values under ''"),
        ({"a": torch.zeros(1).expand(2**16, 2**16)}, "at most 4 times the size of"),
        ({"layer.weight": torch.zeros(2)}, r"albef, .*hf_clip, got names such as layer\.weight"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path, content, message):
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"^source: expected .*{message}") as error:
        convert_checkpoint(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors", "broken.bin"])
@pytest.mark.parametrize("content", [b"not weights", b"", None], ids=["text", "empty", "truncated"])
def test_a_damaged_file_is_named_in_one_line(tmp_path, name, content):
    path = tmp_path / name
    if content is None:
        weights = {"a": torch.zeros(1000)}
        save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
        content = path.read_bytes()[:2000]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=name) as error:
        convert_checkpoint(path)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.* looks like a TorchScript archive")
def test_torchscript_is_refused_with_a_remedy(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "ViT-B-16.pt")
    with pytest.raises(ValueError, match=r"TorchScript .*; if you trust it, save only its state"):
        convert_checkpoint(tmp_path / "ViT-B-16.pt")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_removed(prefix, tmp_path):
    weights = small_open_clip()
    wrapped = {prefix + name: weight for name, weight in weights.items()}
    wrapped |= {  # of a tower that was compiled alone
        name.replace("visual.", "visual._orig_mod."): wrapped.pop(name) for name in list(wrapped)
    }
    expected = convert_checkpoint(saved(weights, tmp_path), **HEADS)
    save_file(wrapped, tmp_path / "wrapped.safetensors")
    for path in (saved(wrapped, tmp_path), tmp_path / "wrapped.safetensors"):
        assert_equal_weights(convert_checkpoint(path, **HEADS), expected)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("visual.proj", lambda w: w.fill_(torch.nan), "expected numbers, got NaN in visual.proj"),
        ("visual.proj", lambda w: w.bool(), r"expected dtype: image_projection\.weight"),
        ("visual.positional_embedding", lambda w: w[1:], r"expected shape: visual\.pos_embed"),
        ("visual.positional_embedding", lambda w: w[:-3], r"expected shape: visual\.pos_embed"),
        ("token_embedding.weight", lambda w: w.to_sparse(), "got a torch.sparse_coo tensor"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, name, change, message):
    weights = small_open_clip()
    weights[name] = change(weights[name])
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(saved(weights, tmp_path), **HEADS)


def test_an_index_that_names_files_elsewhere_is_refused(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    (tmp_path / "model").mkdir()
    index = {"weight_map": {"a": "../a.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"shards beside the index .*got '\.\./a\.safetensors'"):
        read_weights(tmp_path / "model")
