"""A folder of pictures, some of which cannot be read, and a tiny model with weights in a file."""

import shutil
from pathlib import Path

import pytest
import timm
import torch
from pyarrow import parquet

import elip_models
from elip_models.embedding.encoder import open_encoder
from elip_models.pretraining.models.registry import create_model
from tests.helpers.damage import picture
from tests.helpers.tiny_run import own_process

READABLE = 9
SMALL = {"batch_size": 2, "shard_size": 3, "workers": 0, "check": 0}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Return a folder of nine pictures, one of them in a subfolder."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "sub").mkdir()
    for i in range(READABLE - 1):
        (folder / f"{i}.png").write_bytes(picture(i, size=(40 + i, 30)))
    (folder / "sub" / "a.jpg").write_bytes(picture(99, format="JPEG", size=(64, 48)))
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def damaged(pictures, tmp_path):
    """Return a copy of the pictures, with four files that cannot be read."""
    folder = shutil.copytree(pictures, tmp_path / "damaged")
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes((folder / "1.png").read_bytes()[:300])
    (folder / "text.jpg").write_text("no image")
    (folder / "gone.png").symlink_to("nowhere")
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Return the name of a tiny model of timm with weights in a file."""
    path = tmp_path_factory.mktemp("weights") / "test_vit.pt"
    torch.manual_seed(0)
    made = timm.create_model("test_vit")
    for weight in made.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.2)
    torch.save(made.state_dict(), path)
    return f"timm:test_vit:{path}"


@pytest.fixture(scope="session")
def encoder(model):
    """Return the model, opened."""
    return open_encoder(model, device="cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    with own_process():
        yield


def files_of(folder):
    """Contents of the files of an output, but for the lock and the check's times."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name not in (".lock", "check.json")
    }


def embedded(folder):
    return parquet.read_table(folder / "images")


@pytest.fixture(scope="module")
def whole(pictures, model, tmp_path_factory):
    """The output of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    with own_process():
        elip_models.embed(model, pictures, folder, **SMALL)
    return folder


@pytest.fixture(scope="module")
def captioned(pictures, tokenizer, tmp_path_factory):
    """The embeddings of an image-text model that reduces, and the folder of its run."""
    folder = tmp_path_factory.mktemp("captioned")
    torch.manual_seed(0)
    create_model("elip_clip_tiny").eval().save_pretrained(folder / "run" / "model", tokenizer)
    with own_process():
        elip_models.embed(str(folder / "run"), pictures, folder / "out", **SMALL)
    return folder / "out", folder / "run"
