"""Invalid model folders and command lines: one line, exit status 2, nothing is run or written."""

import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from elip_models.pretraining.models.registry import create_model
from tests.helpers.tiny_run import elip

TINY = ("optim.steps=1", "trackers=[]", "report=[]")
LONG = "x" * 300


@pytest.fixture
def model(tokenizer, tmp_path):
    """Return a model folder that a test may damage."""
    return create_model("clip_tiny", vocab_size=600).save_pretrained(tmp_path / "model", tokenizer)


def weights_changed(change):
    def damage(folder):
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def with_nan(folder):
    weights = load_file(folder / "model.safetensors")
    weights["image_projection.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors")


def config_changed(**fields):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return damage


def config_of(text):
    return lambda folder: (folder / "config.json").write_text(text)


def evil_tokenizer(folder):
    """Set the tokenizer's class to a Python file that writes a mark when it is run."""
    path = folder / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    mark = folder / "mark"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")


DAMAGES = {
    "cut short": (
        weights_changed(lambda b: b[: len(b) // 2]),
        "expected a complete safetensors file",
    ),
    "NaN": (with_nan, "expected numbers, got NaN in image_projection.weight"),
    "width": (config_changed(vision_width=2**20), "expected weights that fit"),
    "deep": (config_of("[" * 100_000), "config.json: expected a JSON object"),
    "tokenizer": (evil_tokenizer, "contains custom code"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_folder_is_one_line(model, name, monkeypatch, capsys):
    damage, said = DAMAGES[name]
    damage(model)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever asks is answered
    assert elip("eval", "retrieval", "--model", model, "--data", "emoji_scenes:size=5") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(said, error), error
    assert not (model / "mark").exists()


COMMANDS = {
    "long folder": (["train", "clip_tiny", f"output_dir={LONG}", *TINY], "File name too long"),
    "file": (["train", "clip_tiny", "output_dir=file", *TINY], "a folder that can be written"),
    "deep YAML": (["train", "deep.yaml"], "not valid YAML"),
    "deep JSON": (["data", "check", "deep.json"], "got no valid JSON"),
    "to a folder": (
        ["profile", "--model", "clip_tiny", "--flops-only", "--output", "."],
        "--output: expected a file",
    ),
    "memory": (
        ["profile", "--model", "clip_tiny", "--max-batch", "--memory", f"{'9' * 400}GB"],
        "--memory: expected a size such as 16GB",
    ),
    "no such folder": (
        ["eval", "retrieval", "--model", "a", "--data", "b", "--output", "missing/a.json"],
        "--output: expected a file in a folder that exists",
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_invalid_command_is_one_line(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "deep.yaml").write_text("model: " + "[" * 3_000)
    before = sorted(os.listdir())
    arguments, said = COMMANDS[name]
    assert elip(*arguments) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert sorted(os.listdir()) == before


def test_too_little_memory_is_one_line(monkeypatch, capsys):
    def small(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("elip_models.commands.train.load_recipe", small)
    assert elip("train", "clip_tiny") == 2
    assert "the memory is too small" in capsys.readouterr().err
