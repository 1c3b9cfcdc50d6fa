"""The command line: a whole run, and one line for each error of the user."""

import json

import pytest

from elip_models.cli import main
from elip_models.pretraining.data import train_tokenizer
from elip_models.pretraining.models.registry import create_model
from elip_models.pretraining.training import report
from elip_models.validation import ConfigError
from tests.helpers.damage import shard
from tests.helpers.tiny_run import elip, logged, tiny_arguments


def test_train_prints_loss_scores_and_chance_and_eval_gives_the_same_scores(tmp_path, capsys):
    run, output = tmp_path / "run", tmp_path / "scores.json"
    assert elip(*tiny_arguments(run, "report=[retrieval]")) == 0
    printed = capsys.readouterr().out
    for text in ("step 4/4", "loss", "image_to_text_r1", "chance", "10.0 ", "could be read"):
        assert text in printed
    files = {path.name for path in run.iterdir()}
    assert files == {".lock", "provenance.jsonl", "recipe.yaml", "tokenizer"} | {
        *("metrics.jsonl", "checkpoints", "model")
    }
    data = ["--data", "emoji_scenes:seed=1,size=10", "--output", output]
    assert elip("eval", "retrieval", "--model", run / "model", *data) == 0
    assert "retrieval: 10 examples" in capsys.readouterr().out
    scores = json.loads(output.read_text())["scores"]
    assert {name: score["mean"] for name, score in scores.items()} == logged(run, *scores)[-1]


def test_a_command_shows_at_once_that_it_lists_images(tmp_path, monkeypatch, capsys):
    model = create_model("clip_tiny")
    model.save_pretrained(tmp_path)
    tokenizer = train_tokenizer(["a cat on a mat"] * 9, 300)
    tokenizer.save_pretrained(tmp_path)
    shown = []

    def listed(*arguments, **options):
        shown.append(capsys.readouterr().err)
        raise ConfigError("stopped")

    monkeypatch.setattr("elip_models.pretraining.tasks.zero_shot.open_classes", listed)
    monkeypatch.setattr("pathlib.Path.rglob", listed)
    assert elip("eval", "zero-shot", "--model", tmp_path, "--data", "/") == 2
    assert elip("calibrate", "timm:test_vit", tmp_path) == 2
    for text, folder in zip(shown, ("/", tmp_path), strict=True):
        assert text.endswith(f"listing the images in {folder}\n")


def test_train_writes_the_reports_of_the_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "ROUNDS", 1)
    assert elip(*tiny_arguments(tmp_path, "report=[timing, picture]", "optim.steps=1")) == 0
    printed = capsys.readouterr().out
    assert "batch 8: relative to dense" in " ".join(printed.split())
    assert (tmp_path / "timing.json").is_file() and (tmp_path / "kept_tokens.png").is_file()


def test_data_check(capsys):
    assert elip("data", "check", "emoji_scenes:size=6", "--image-size", 32) == 0
    printed = capsys.readouterr().out
    assert "6 of 6 read" in printed
    assert "30, 5.00 per sample" in printed


def test_data_check_of_a_stream_counts_its_samples(tmp_path, capsys):
    url = f"file://{shard(tmp_path / '0.tar').parent}/{{0..1}}.tar"
    assert elip("data", "check", url) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "7 of 7 read" in printed and "No such file" in printed
    shard(tmp_path / "1.tar")
    assert elip("data", "check", url) == 0
    assert "12 of 12 read" in capsys.readouterr().out


def test_data_check_fails_on_unreadable_samples(tmp_path, capsys):
    data = tmp_path / "list.json"
    data.write_text(json.dumps([{"image": "missing.png", "caption": "a dog"}]))
    assert elip("data", "check", data) == 1
    assert "missing.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "clip_tny"], "`elip recipes` lists; did you mean 'clip_tiny'?"),
        (["train", "clip_tiny", "optim.lr=fast"], "optim.lr: must be a valid number"),
        (["train", "clip_vit_b16_cc12m"], "data.train=VALUE"),
        (["eval", "retrieval", "--model", "missing", "--data", "a.json"], "--model: "),
        (["data", "check", "missing.json"], "SPEC: "),
    ],
)
def test_mistake_is_one_line_and_exit_status_2(arguments, message, capsys):
    assert elip(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_bug_keeps_its_traceback(monkeypatch):
    def broken(*_):
        raise ValueError("a bug")

    monkeypatch.setattr("elip_models.commands.train.load_recipe", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["train", "clip_tiny"])
