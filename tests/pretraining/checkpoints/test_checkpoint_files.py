"""Files of checkpoints: their content, names of tensors, and errors."""

import argparse
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from elip_models.pretraining.checkpoints.load import convert_checkpoint
from tests.helpers.weights import assert_equal_weights
from tests.pretraining.checkpoints.test_checkpoints import HEADS, saved, small_open_clip


class Surprise:
    """A class whose pickle runs code."""

    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


@pytest.mark.parametrize("content", [{"model": Surprise()}, "text", {"model": {"a": 1}}, {}])
def test_files_with_other_content_than_tensors_raise(tmp_path, content):
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match="source: expected"):
        convert_checkpoint(path)


def test_the_error_names_the_classes_in_a_pickle(tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {"a": torch.zeros(1)}, "args": argparse.Namespace(lr=1)}, path)
    with pytest.raises(ValueError, match=r"got argparse\.Namespace, which could run code"):
        convert_checkpoint(path)


def test_a_broken_file_raises(tmp_path):
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(ValueError, match=rf"source: .*{name}"):
            convert_checkpoint(tmp_path / name)


def test_the_error_for_a_truncated_file_has_a_remedy(tmp_path):
    path = saved({"a": torch.zeros(1000)}, tmp_path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"got a damaged file .*; copy or download it again"):
        convert_checkpoint(path)


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
        model = convert_checkpoint(path, **HEADS)
        assert_equal_weights(model, expected)


def test_openai_clip_has_quick_gelu_by_its_names(tmp_path):
    numbers = {"input_resolution": 48, "context_length": 8, "vocab_size": 50}
    weights = small_open_clip() | {name: torch.tensor(n) for name, n in numbers.items()}
    assert convert_checkpoint(saved(weights, tmp_path), **HEADS).config.activation == "quick_gelu"
    plain = convert_checkpoint(saved(small_open_clip(), tmp_path), **HEADS)
    assert plain.config.activation == "gelu"


def test_the_error_for_torchscript_names_the_remedy(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "ViT-B-16.pt")
    with pytest.raises(ValueError, match=r"got TorchScript, .*; if you trust it, torch\.save"):
        convert_checkpoint(tmp_path / "ViT-B-16.pt")


def test_nan_is_named(tmp_path):
    weights = small_open_clip()
    weights["visual.proj"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"checkpoint\.pth: expected numbers, got NaN in visual"):
        convert_checkpoint(saved(weights, tmp_path), **HEADS)


@pytest.mark.parametrize("grid", ["no class token", "no square"])
def test_position_embeddings_of_another_layout_raise(grid, tmp_path):
    weights = small_open_clip()
    positions = weights["visual.positional_embedding"]
    weights["visual.positional_embedding"] = (
        positions[1:] if grid == "no class token" else (torch.cat([positions, positions[-4:]]))
    )
    with pytest.raises(ValueError, match=r"expected shape: visual\.pos_embed"):
        convert_checkpoint(saved(weights, tmp_path), **HEADS)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "index.json: expected a JSON object, got no valid JSON"),
        ("[]", r"index.json: expected a JSON object, got \[\]"),
        ('{"weight_map": 3}', "expected weights, or the index of their shards, got"),
        ('{"weight_map": {"a": "b.safetensors"}}', r"expected .*b\.safetensors, which .* names"),
    ],
)
def test_a_broken_index_of_shards_is_named(index, message, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert_checkpoint(tmp_path)


def test_a_compressed_file_that_could_fill_the_memory_raises(tmp_path):
    plain, bomb = tmp_path / "plain.pth", tmp_path / "bomb.pth"
    torch.save({"model": {"a": torch.zeros(10**6)}}, plain)
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    assert torch.load(bomb, weights_only=True) and bomb.stat().st_size < 10**5
    with pytest.raises(ValueError, match="which would unpack to 4000"):
        convert_checkpoint(bomb)
