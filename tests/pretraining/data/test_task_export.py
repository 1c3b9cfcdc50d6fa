"""`elip data export` and `check`: built-in data as files, read back to equal examples."""

import json

import pytest
from PIL import Image

from elip_models.pretraining.data import export, open_examples, open_source
from elip_models.pretraining.data.tasks.export import _WRITERS
from tests.helpers.tiny_run import elip

SIZES = {"vqa": 24, "entailment": 12, "nlvr2": 12, "classification": 12}
BUILT_IN = {
    "vqa": "emoji_questions",
    "entailment": "emoji_entailment",
    "nlvr2": "emoji_pairs",
    "classification": "emoji_classes",
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("task", BUILT_IN)
def test_an_export_reads_back_to_equal_examples(task, tmp_path):
    spec = f"{BUILT_IN[task]}:seed=3,size={SIZES[task]},textures=true"
    written = export(task, spec, tmp_path / "out", image_size=32)
    source = open_examples(task, spec, image_size=32)
    found = open_examples(task, written[-1], image_size=16)
    assert (len(found), found.answers) == (len(source), source.answers)
    for index in range(len(source)):
        assert found[index]._replace(id="") == source[index]._replace(id="")


def test_an_exported_folder_of_classes_is_ordered_by_name(tmp_path):
    spec = "emoji_classes:seed=3,size=8"
    folder, _ = export("classification", spec, tmp_path / "out", image_size=32)
    source = open_examples("classification", spec, image_size=32)
    found = open_examples("classification", folder, image_size=16)
    assert found.answers == tuple(sorted(source.answers[:8]))
    by_class = {next(iter(example.answers)): example.images for example in found}
    assert by_class == {next(iter(source[i].answers)): source[i].images for i in range(8)}


@pytest.mark.parametrize("task", ["retrieval", "captioning"])
def test_an_export_of_captions_reads_back_to_equal_samples(task, tmp_path):
    spec = "emoji_scenes:seed=3,size=5,clutter=2"
    (written,) = export(task, spec, tmp_path / "out", image_size=32)
    source, found = (open_source(each, image_size=32) for each in (spec, written))
    assert len(found) == 5
    for index in range(5):
        assert found[index]._replace(id="") == source[index]._replace(id="")


@pytest.mark.parametrize("task", ["retrieval", "captioning"])
def test_an_export_of_pairs_has_each_image_once(task, tmp_path):
    image = open_source("emoji_scenes:size=1", image_size=32)[0].image
    image.save(tmp_path / "a.png")
    pairs = [{"image": "a.png", "caption": text} for text in ("one", "two")]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    (written,) = export(task, str(tmp_path / "pairs.json"), tmp_path / "out", image_size=32)
    (sample,) = open_source(written, image_size=32)
    assert sample.captions == ("one", "two")


def test_an_export_needs_an_empty_folder(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="folder: expected a new or an empty folder"):
        export("vqa", "emoji_questions:size=2", tmp_path / "full", image_size=16)
    assert elip("data", "export", "vqa", "emoji_questions:size=2", tmp_path / "full") == 2
    assert "expected a new or an empty folder" in capsys.readouterr().err


def test_data_export_prints_the_line_that_data_check_reads(tmp_path, capsys):
    assert elip("data", "export", "entailment", "emoji_entailment:size=6", tmp_path / "out") == 0
    (spec,) = capsys.readouterr().out.split()
    assert elip("data", "check", spec, "--task", "entailment") == 0
    printed = capsys.readouterr().out
    for text in ("6 of 6 read", "different texts", "neutral", "2 (33.3%)"):
        assert text in printed
    (tmp_path / "out" / "images" / "4.png").unlink()
    assert elip("data", "check", spec, "--task", "entailment") == 1
    assert "snli_ve.jsonl[4] 4.jpg (no such file" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "a.json", "--task", "vqs"], "TASK: task: expected one of 'vqa'"),
        (["check", "no.json", "--task", "vqa"], "SPEC: expected an existing file"),
        (["export", "nlvr2", "emoji_questions:size=2", "out"], "SPEC: expected emoji_pairs"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert elip("data", *arguments) == 2
    assert message in capsys.readouterr().err


def test_an_export_that_fails_leaves_an_empty_folder(tmp_path, monkeypatch):
    def full(*_, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("elip_models.pretraining.data.tasks.export._write_json", full)
    with pytest.raises(OSError, match="No space"):
        export("vqa", "emoji_questions:size=3", tmp_path / "out", image_size=32)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_export_has_its_name_only_once_it_is_complete(tmp_path, monkeypatch):
    def killed(source, folder):
        (folder / "images" / "0.png").write_bytes(b"")
        assert folder.parent == tmp_path / "out" and folder.name.startswith(".")
        raise KeyboardInterrupt

    monkeypatch.setitem(_WRITERS, "vqa", killed)
    with pytest.raises(KeyboardInterrupt):
        export("vqa", "emoji_questions:size=3", tmp_path / "out", image_size=32)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_export_into_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (written,) = export("captioning", "emoji_scenes:size=3", ".", image_size=32)
    assert len(open_source(written, image_size=32)) == 3


@pytest.mark.parametrize("name", ["../../x", "/x", "..", "a/b", "a\0b", ""])
def test_names_of_an_export_stay_inside_of_its_folder(tmp_path, monkeypatch, name):
    class Hostile:
        answers = (name,)

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return [Image.new("RGB", (8, 8))], "", {name: 1.0}, name

    monkeypatch.setattr(
        "elip_models.pretraining.data.tasks.export.open_examples", lambda *_, **__: Hostile()
    )
    for task in ("classification", "nlvr2"):
        with pytest.raises(ValueError, match="expected a name without"):
            export(task, "a.json", tmp_path / "a" / "out", image_size=32)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [*(tmp_path / "a").rglob("*")] == [tmp_path / "a" / "out"]
