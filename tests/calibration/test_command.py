"""`elip calibrate`: the task is found, and a mistake is one line."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf

import elip_models
from tests.helpers.tiny_run import elip

NAMES = ["cat", "dog", "owl", "fox", "hen", "red panda"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the folder of a classifier, and one of images in the folders of what it answers."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=len(NAMES), img_size=64).eval()
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.2)
    config = {"label_names": NAMES, "input_size": [3, 64, 64]}
    save_for_hf(model, folder / "vit", model_args={"img_size": 64}, model_config=config)
    model.pretrained_cfg["input_size"] = (3, 64, 64)
    transform = create_transform(**resolve_data_config(model=model))
    rng = np.random.default_rng(0)
    for i in range(40):
        image = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((64, 70))
        with torch.no_grad():
            name = NAMES[model(transform(image)[None]).argmax()].replace(" ", "_")
        path = folder / "photos" / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    (folder / "photos" / "cat" / "a.jpg").write_bytes(b"no image")
    return folder


NO_GAIN = "elip_models.calibration.results.no_gain"


@pytest.fixture(autouse=True)
def a_choice_saves_time(monkeypatch):
    """Tiny models on a busy machine may save none."""
    monkeypatch.setattr(NO_GAIN, lambda ratio: False)


def arguments(made, *more):
    return "calibrate", f"timm:local-dir:{made / 'vit'}", made / "photos", *more


def test_a_classifier_is_judged_by_its_head(made, tmp_path, capsys):
    options = "--output", tmp_path / "out", "--tolerance", 1, "--labels", "folders"
    assert elip(*arguments(made, *options)) == 0
    shown = capsys.readouterr()
    assert "task: head, since the labels are among the 6 classes of the model's head" in shown.err
    assert "1 of 41 images were not read" in shown.err
    assert {"best.json", "results.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["task"] == "head"
    model = timm.create_model(f"local-dir:{made / 'vit'}")
    elip_models.reduce_(model, str(tmp_path / "out" / "best.json"))
    assert elip_models.is_reduced(model)


def test_the_former_name_of_the_task_warns(made, tmp_path, capsys):
    options = "--output", tmp_path / "out", "--metric", "nonsense"
    assert elip(*arguments(made, *options)) != 0
    warning, error = capsys.readouterr().err.splitlines()
    assert warning == "warning: --metric is now --task; version 0.3.0 removes --metric"
    assert "--task: expected head" in error


@pytest.mark.slow
def test_the_choice_serves_the_other_commands(made, tmp_path, capsys):
    options = "--output", tmp_path / "out", "--tolerance", 1, "--labels", "folders"
    assert elip(*arguments(made, *options)) == 0
    best, spec = tmp_path / "out" / "best.json", f"timm:local-dir:{made / 'vit'}"
    embed = "embed", made / "photos", "--model", spec, "--output", tmp_path / "embedded"
    assert elip(*embed, "--reduce", best, "--workers", 0) == 0
    distill = "distill", spec, made / "photos", "--output", tmp_path / "distilled", "--steps", 1
    assert elip(*distill, "--strategy", best) == 0
    assert elip_models.is_reduced(elip_models.load_reduced(tmp_path / "distilled"))


@pytest.mark.slow
def test_a_choice_that_is_not_confirmed_is_not_written(made, tmp_path, capsys):
    options = "--output", tmp_path / "out", "--tolerance", 1e-9, "--labels", "folders"
    assert elip(*arguments(made, *options)) == 1
    assert "best.json was not written" in capsys.readouterr().err
    assert not (tmp_path / "out" / "best.json").exists()


@pytest.mark.slow
def test_a_choice_that_saves_no_time_is_not_written(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(NO_GAIN, lambda ratio: True)
    options = "--output", tmp_path / "out", "--tolerance", 1, "--labels", "folders"
    assert elip(*arguments(made, *options)) == 1
    assert "no setting within the tolerance saves time on this machine" in capsys.readouterr().err
    assert not (tmp_path / "out" / "best.json").exists()


@pytest.mark.slow
def test_a_function_of_the_user_judges(made, tmp_path, capsys):
    own = tmp_path / "own.py"
    own.write_text("def changed(dense, reduced):\n    return (dense - reduced).abs().mean(1) / 9\n")
    options = "--output", tmp_path / "out", "--task", f"{own}:changed", "--tolerance", 1
    assert elip(*arguments(made, *options)) == 0
    assert "1 - changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "haed"], "--task: expected head, .* did you mean 'head'"),
        (["--task", "probe"], "--labels: expected at least 10 images of each class, got"),
        (["--task", "zero-shot"], "--task: expected zero-shot with an image-text model, got"),
        (["--task", "cosine", "--labels", "folders"], "--labels: expected none with --task"),
        (["--labels", "{bad}"], "--labels: expected a class of the head, got 'dgo'; did you mean"),
        (["--labels", "{few}"], "--labels: expected a line image,label for each image"),
        (["--labels", "{wrong}"], "--labels: expected classes that the head tells apart, got"),
        (["--labels", "no.csv"], "--labels: expected 'folders' or a CSV file"),
        (["--task", "no.py:f"], "--task: expected FILE.py:function with a Python file"),
        (["--compare", "evti 0.7"], "--compare: expected NAME .* did you mean 'evit'"),
        (["--dtype", "int8"], "--dtype: expected fp32, bf16, fp16, got 'int8'"),
        (["--device", "cuda:99"], "--device: expected one of this machine"),
        (["--output", "out.json"], "--output: expected a folder, or a name for a new one"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    options, message, made, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    photos = made / "photos"
    names = [path.relative_to(photos).as_posix() for path in photos.rglob("*.*")]
    labelled = [(name, name.partition("/")[0]) for name in names]
    rows = [",".join(row) for row in labelled]
    wrong = [f"{name},{NAMES[5 - NAMES.index(of.replace('_', ' '))]}" for name, of in labelled]
    files = {"bad": [f"{names[0]},dgo", *rows[1:]], "few": rows[1:], "wrong": wrong}
    for file, lines in files.items():
        (tmp_path / f"{file}.csv").write_text("\n".join(lines))
    paths = {file: tmp_path / f"{file}.csv" for file in files}
    options = [option.format(**paths) for option in options]
    assert elip(*arguments(made, *options)) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert re.search(message, line)
    assert {path.name for path in tmp_path.iterdir()} == {f"{file}.csv" for file in files}


def test_an_empty_folder_of_a_class_is_refused(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "photos", "photos")
    Path("photos", "yak").mkdir()
    assert elip("calibrate", f"timm:local-dir:{made / 'vit'}", "photos", "--labels", "folders") == 2
    assert "got none in photos/yak" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
