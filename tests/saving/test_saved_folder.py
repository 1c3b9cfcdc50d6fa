"""A save replaces the files of an earlier one, and nothing else in the folder."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import mkdtemp

import pytest
from filelock import FileLock

import elip_models
from elip_models.pretraining.models.base import WRITTEN
from elip_models.pretraining.models.registry import create_model
from elip_models.saving.saved_folder import saved_folder
from tests.killed_saves import contents, quiet, save_of


def save(folder, **files):
    """A save of these files; underscores in their names stand for dots."""
    with saved_folder(folder) as new:
        for name, text in files.items():
            (new / name.replace("_", ".")).write_text(text)


def texts(folder):
    return {name: content.decode() for name, content in contents(folder).items()}


def test_files_of_the_user_stay_and_all_of_an_earlier_save_go(tmp_path):
    folder = tmp_path / "model"
    save(folder, config_json="{}", elip_json="{}")
    (folder / "sub").mkdir()
    mine = {"notes.txt": "1", "sub/model.safetensors": "2", "tokenizer.json": "{}"}
    for name, text in mine.items():
        (folder / name).write_text(text)
    (folder / "link").symlink_to("notes.txt")
    inode = (folder / "notes.txt").stat().st_ino
    save(folder, config_json="[]")
    assert texts(folder) == mine | {"link": "1", "config.json": "[]"}
    assert (folder / "link").is_symlink() and (folder / "notes.txt").stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_save_with_a_tokenizer_replaces_every_file_of_the_old_one(tmp_path):
    save(tmp_path / "a", config_json="{}", vocab_txt="old", merges_txt="old")
    save(tmp_path / "a", config_json="{}", tokenizer_json="{}")
    assert texts(tmp_path / "a") == {"config.json": "{}", "tokenizer.json": "{}"}


def test_a_card_is_replaced_unless_it_was_edited(tmp_path):
    folder = tmp_path / "model"
    save(folder, config_json="{}", README_md="first")
    save(folder, config_json="{}", README_md="second")
    card = (folder / "README.md").read_text()
    assert card.startswith("second") and "first" not in card
    (folder / "README.md").write_text(card + "mine")
    save(folder, config_json="{}", README_md="third")
    assert (folder / "README.md").read_text() == card + "mine"


PROBLEMS = {
    "a mount point": lambda folder, patch: patch.setattr("os.path.ismount", lambda path: True),
    "the current directory": lambda folder, patch: patch.chdir(folder / "sub"),
    "in a folder that cannot be written": lambda folder, patch: patch.setattr(
        "os.access", lambda path, mode: False
    ),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_folder_that_cannot_be_replaced_is_refused_and_filled_if_it_has_no_save(
    problem, tmp_path, monkeypatch
):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    PROBLEMS[problem](folder, monkeypatch)
    save(folder, config_json="{}")
    with pytest.raises(ValueError, match=f"earlier save.*{problem}.*or remove config.json first"):
        save(folder, config_json="[]")
    assert texts(folder) == {"config.json": "{}"}
    assert {path.name for path in tmp_path.rglob("*")} == {"model", "sub", "config.json"}


def test_saves_at_once_leave_one_of_them(tmp_path):
    folder = tmp_path / "model"
    save(folder, config_json="{}")
    (folder / "notes.txt").write_text("mine")
    names = ["elip_json", "adapter_json"] * 16
    with ThreadPoolExecutor(8) as pool:
        saves = [
            pool.submit(save, folder, config_json=f"[{i}]", **{name: "{}"})
            for i, name in enumerate(names)
        ]
    for done in saves:
        done.result()  # none has failed
    found = texts(folder)
    number = int(found.pop("config.json").strip("[]"))
    assert found == {names[number].replace("_", "."): "{}", "notes.txt": "mine"}


def test_a_file_that_is_removed_during_a_save_does_not_stop_it(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    save(folder, config_json="{}")
    (folder / "notes.txt").write_text("mine")
    link = os.link

    def removed(source, target):
        os.unlink(source)
        link(source, target)

    monkeypatch.setattr(os, "link", removed)
    save(folder, config_json="[]")
    assert texts(folder) == {"config.json": "[]"}


def test_a_hidden_folder_that_another_save_takes_for_a_left_one_is_made_again(
    tmp_path, monkeypatch
):
    made = []

    def taken(**options):
        made.append(FileLock(Path(mkdtemp(**options)) / "lock"))
        if len(made) == 1:
            made[0].acquire()
        return Path(made[-1].lock_file).parent

    monkeypatch.setattr("elip_models.saving.saved_folder.mkdtemp", taken)
    save(tmp_path / "model", config_json="{}")
    made[0].release()
    assert len(made) == 2 and texts(tmp_path / "model") == {"config.json": "{}"}


def test_an_upload_removes_the_files_of_an_earlier_save_in_its_commit(monkeypatch):
    uploads = []

    def upload(self, **options):
        uploads.append((sorted(os.listdir(options["folder_path"])), options["delete_patterns"]))
        return "address"

    api = "huggingface_hub.hub_mixin.HfApi"
    monkeypatch.setattr(f"{api}.upload_folder", upload)
    monkeypatch.setattr(
        f"{api}.create_repo", lambda self, repo_id, **_: type("Url", (), {"repo_id": repo_id})
    )
    assert create_model("clip_tiny").push_to_hub("me/model") == "address"
    assert uploads == [(["README.md", "config.json", "model.safetensors"], [*WRITTEN])]


DENSE = {
    "timm": r"open_model\('timm:local-dir:",
    "open_clip": r"open_clip.create_model\('local-dir:",
    "transformers": r"open_model\('hf:",
}


@pytest.mark.parametrize("library", DENSE)
def test_a_dense_folder_is_refused_with_the_remedy_before_its_weights_are_read(
    library, tmp_path, monkeypatch
):
    with quiet():
        save_of(library, 0)(tmp_path)
    (tmp_path / "elip.json").unlink(missing_ok=True)
    if library == "transformers":
        text = (tmp_path / "config.json").read_text().replace('"elip": {', '"other": {')
        (tmp_path / "config.json").write_text(text)
    for weights in tmp_path.glob("*.safetensors"):
        weights.write_bytes(b"not read")
    with pytest.raises(FileNotFoundError, match=f"the model is dense: load it by {DENSE[library]}"):
        elip_models.load_reduced(tmp_path)
    if library != "transformers":
        with pytest.raises(ValueError, match=r"spec: .*local-dir:"):
            elip_models.open_model(str(tmp_path))
