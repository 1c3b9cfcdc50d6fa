"""A save replaces the files of an earlier one, and nothing else in the folder."""

import os
import threading

import pytest

import elip_models
from elip_models.pretraining.models.base import WRITTEN
from elip_models.pretraining.models.registry import create_model
from elip_models.saving import saved_folder as module
from elip_models.saving.locked_folder import locked_folder
from elip_models.saving.saved_folder import saved_folder
from elip_models.validation import ConfigError
from tests.killed_saves import contents, quiet, save_of, without_exchange


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


def test_a_card_names_the_library_of_the_last_save(tmp_path):
    with quiet():
        for library in ("timm", "open_clip"):
            save_of(library, 0)(tmp_path / "model")
    assert "library_name: open_clip" in (tmp_path / "model" / "README.md").read_text()


def test_a_symbolic_link_stays_and_its_folder_is_replaced(tmp_path):
    save(tmp_path / "model", config_json="{}", elip_json="{}")
    (tmp_path / "link").symlink_to("model")
    save(tmp_path / "link", config_json="[]")
    assert (tmp_path / "link").is_symlink() and texts(tmp_path / "model") == {"config.json": "[]"}


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


def test_a_folder_that_the_system_does_not_rename_is_refused_unchanged(tmp_path, monkeypatch):
    def busy(*names):
        raise OSError(16, "Device or resource busy")

    save(tmp_path / "model", config_json="{}")
    monkeypatch.setattr(module, "_exchange", busy)
    with pytest.raises(ValueError, match="not renamed by the system: Device or resource busy"):
        save(tmp_path / "model", config_json="[]")
    assert texts(tmp_path) == {"model/config.json": "{}"}


@pytest.mark.parametrize("name", ["config_json", "model_safetensors"])
def test_a_file_that_is_incomplete_is_not_saved(name, tmp_path):
    save(tmp_path / "model", config_json="{}")
    with pytest.raises(ValueError, match=f"{name.replace('_', '.')}: expected"):
        save(tmp_path / "model", **{name: '{"half'})
    assert texts(tmp_path) == {"model/config.json": "{}"}


def test_what_a_killed_save_left_is_removed_and_a_running_one_is_not(tmp_path):
    folder = tmp_path / "model"
    save(folder, config_json="{}")
    killed = tmp_path / ".model.saving-killed"
    (killed / "new").mkdir(parents=True)
    (killed / "lock").touch()
    with saved_folder(folder) as new:
        (new / "config.json").write_text("[1]")
        save(folder, config_json="[2]")
        assert new.exists() and not killed.exists()
    assert texts(tmp_path) == {"model/config.json": "[1]"}


def test_a_run_keeps_its_lock_of_a_folder_that_is_replaced(tmp_path):
    folder, options = tmp_path / "run", {"marker": "state"}
    with locked_folder(folder, "--output", **options):
        (folder / "state").touch()
        save(folder, config_json="{}")
        save(folder, config_json="[]")
        with (
            pytest.raises(ConfigError, match="in use by another run"),
            locked_folder(folder, "--output", **options),
        ):
            pass
    assert texts(folder) == {"config.json": "[]", "state": "", ".lock": ""}


def test_saves_at_once_leave_one_of_them(tmp_path):
    folders = [tmp_path / "model"] * 8
    save(folders[0], config_json="{}")
    names = ["elip_json", "adapter_json"] * 4
    threads = [
        threading.Thread(target=save, args=(folder,), kwargs={"config_json": f"[{i}]", name: "{}"})
        for i, (folder, name) in enumerate(zip(folders, names, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = texts(tmp_path / "model")
    number = int(found.pop("config.json").strip("[]"))
    assert found == {names[number].replace("_", "."): "{}"}


def test_a_folder_that_a_kill_has_left_without_a_name_is_found_again(tmp_path):
    with quiet():
        save_of("timm", 0)(tmp_path / "model")
    for load in (elip_models.load_reduced, lambda folder: elip_models.open_model(str(folder))):
        os.rename(tmp_path / "model", tmp_path / ".model.replaced")
        assert elip_models.is_reduced(load(tmp_path / "model"))
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with without_exchange():
        save(tmp_path / "model", config_json="{}")
    assert texts(tmp_path) == {"model/config.json": "{}"}


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


def test_another_model_of_ours_has_no_answers_of_the_one_before(tmp_path):
    create_model("clip_tiny").save_pretrained(tmp_path)
    (tmp_path / "answers.json").write_text('["old"]')
    create_model("clip_tiny").save_pretrained(tmp_path)
    assert not (tmp_path / "answers.json").exists()


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


def test_a_dense_model_of_ours_is_refused_before_its_weights_are_read(tmp_path):
    create_model("clip_tiny").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(ValueError, match="got a dense CLIP"):
        elip_models.load_reduced(tmp_path)
