"""open_clip's own training script trains and resumes with a reduced image tower."""

import json
import os
import re
import subprocess
import sys
from contextlib import ExitStack
from importlib import import_module

import pytest
import torch
from PIL import Image

from elip_models.api import is_reduced
from elip_models.integrations import open_clip
from elip_models.integrations.open_clip import TESTED, ReduceFirstModel, main, parse_reduce
from tests.helpers.models import ids, open_clip_pair, output_of_guided_pair, output_of_pair
from tests.helpers.own_warnings import UNGUIDED

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 4}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write eight images, their captions as csv, and a tiny model for open_clip's `local-dir:`."""
    folder = tmp_path_factory.mktemp("open_clip")
    rows = ["filepath\ttitle"]
    for i in range(8):
        Image.new("RGB", (40, 40), (30 * i, 255 - 30 * i, 90)).save(folder / f"{i}.png")
        rows.append(f"{folder / f'{i}.png'}\ta plain picture, number {i}")
    (folder / "train.csv").write_text("\n".join(rows))
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def train(data, logs, *arguments):
    """Run `python -m elip_models.open_clip_train`, two steps per epoch, and return its log."""
    command = [sys.executable, "-m", "elip_models.open_clip_train", *arguments]
    command += ["--model", f"local-dir:{data}", "--train-data", str(data / "train.csv")]
    command += ["--logs", str(logs), "--name", "run", "--dataset-type", "csv", "--batch-size", "4"]
    command += ["--workers", "0", "--precision", "fp32", "--device", "cpu", "--warmup", "1"]
    command += ["--lr", "1e-3", "--log-every-n-steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    return (logs / "run" / "out.log").read_text()


def losses(log):
    return [float(loss) for loss in re.findall(r"Contrastive_loss: ([\d.]+)", log)]


@pytest.mark.slow
def test_open_clip_trains_and_resumes_what_it_saved(data, tmp_path):
    log = train(data, tmp_path, "--epochs", "1", "--reduce", "keep=0.7")
    assert "Image tower reduced" in log and len(losses(log)) == 2
    saved = torch.load(tmp_path / "run" / "checkpoints" / "epoch_1.pt", weights_only=False)
    assert saved["epoch"] == 1 and not any("reduc" in name for name in saved["state_dict"])
    resume = ("--epochs", "2", "--resume", "latest", "--grad-checkpointing")
    log = train(data, tmp_path, *resume, "--reduce", "keep=0.7")
    assert "resuming checkpoint" in log and len(losses(log)) == 4
    again = torch.load(tmp_path / "run" / "checkpoints" / "epoch_2.pt", weights_only=False)
    assert again["state_dict"].keys() == saved["state_dict"].keys()
    assert any(
        not torch.equal(again["state_dict"][name], value)
        for name, value in saved["state_dict"].items()
    )


def test_only_the_first_model_is_reduced():
    models = [open_clip_pair(), open_clip_pair()]
    made = iter(models)
    options = {"strategy": "tome"}
    create = ReduceFirstModel(lambda: (next(made), "train", "val"), options, ExitStack())
    assert create() == (models[0], "train", "val") and create()[0] is models[1]
    assert "forward" in vars(models[0].visual.transformer.resblocks[0])
    assert "forward" not in vars(models[1].visual.transformer.resblocks[0])


@UNGUIDED
def test_each_caption_guides_its_image_until_training_ends():
    model, x, tokens = open_clip_pair().eval(), torch.randn(2, 3, 48, 48), ids()
    with ExitStack() as stack:
        ReduceFirstModel(lambda: (model, "train"), {"strategy": "elip:fusion=0.2"}, stack)()
        guided = output_of_pair(model, x, tokens)
        assert torch.equal(guided, output_of_guided_pair(model, x, tokens))
    assert not torch.equal(output_of_pair(model, x, tokens), guided)


def test_reduce_is_a_strategy_or_a_share_or_both():
    assert parse_reduce(["tome:r=8"])[1] == {"strategy": "tome:r=8"}
    assert parse_reduce(["keep=0.7"])[1] == {"strategy": "merge", "keep": 0.7}
    spec, options = parse_reduce(["evit", "keep=0.7"])
    assert spec.name == "evit" and options == {"strategy": "evit", "keep": 0.7}
    with pytest.raises(ValueError, match="expected one strategy and one keep=SHARE, got"):
        parse_reduce(["evit", "tome"])


PARSE = "from types import SimpleNamespace\nparse_args = lambda _: SimpleNamespace(val_data=None)\n"
MAKE = "from tests.helpers.models import open_clip_pair\n"
MAKE += "create_model_and_transforms = lambda: (open_clip_pair(), 'train', 'val')\n"


def run_script(text, folder, monkeypatch):
    """Run `main` on another script, and return the script as other code imports it."""
    (folder / "another_script.py").write_text(PARSE + text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "another_script", raising=False)
    monkeypatch.setattr(open_clip, "SCRIPT", "another_script")
    imported = import_module("another_script")
    main(["--reduce", "tome"])
    return imported


def test_the_script_reduces_and_the_imported_one_does_not_change(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    run = "def main(_):\n    create_model_and_transforms()\n"
    imported = run_script(MAKE + run, tmp_path, monkeypatch)
    assert "Image tower reduced" in caplog.text
    assert not is_reduced(imported.create_model_and_transforms()[0])


@pytest.mark.parametrize("text", ["main = lambda _: None\n", MAKE + "main = lambda _: None\n"])
def test_a_release_with_another_script_leads_to_the_tested_ones(text, tmp_path, monkeypatch):
    with pytest.raises(TypeError, match=rf"install open_clip_torch {TESTED[0]} to {TESTED[1]}, "):
        run_script(text, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "ViT-B-16"], "required: --reduce"),
        (["--reduce", "tomato"], "--reduce: strategy: expected NAME or NAME:key=value"),
        (["--reduce", "keep=much"], "--reduce: keep: expected a number in (0, 1], got 'much'"),
        (["--reduce", "elip", "--val-data", "a.csv"], "--val-data: expected none with"),
    ],
)
def test_invalid_arguments_raise_before_a_model_is_created(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
