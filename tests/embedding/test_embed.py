"""`embed` writes what the model returns, lists what it cannot read, and continues when stopped.

The tests run the command and read its files; they import no part of it but what they replace.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import timm
import torch
from filelock import FileLock
from PIL import Image
from pyarrow import parquet

import elip_models
from elip_models.embedding import encoder as encoders
from elip_models.embedding import output
from elip_models.saving.files import read_checked, write_checked
from elip_models.validation import ConfigError
from tests.embedding.conftest import READABLE, SMALL, embedded, files_of
from tests.helpers.tiny_run import elip, own_process
from tests.helpers.torchrun import run_twice

SKIPPED = ["cut.png", "empty.png", "gone.png", "text.jpg"]


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def command(source, model, folder, *options):
    options = ["--batch-size=2", "--shard-size=3", "--workers=0", *options]
    return [str(part) for part in ("embed", source, "--model", model, "--output", folder, *options)]


def test_the_embeddings_are_the_pooled_features_of_the_model(whole, pictures, model):
    table = embedded(whole)
    made = timm.create_model("test_vit", num_classes=0).eval()
    weights = torch.load(model.partition("vit:")[2], weights_only=True)
    made.load_state_dict({k: v for k, v in weights.items() if not k.startswith("head.")})
    config = timm.data.resolve_model_data_config(made)
    transform = timm.data.create_transform(**config, is_training=False)
    keys = sorted(["sub/a.jpg", *(f"{i}.png" for i in range(READABLE - 1))])
    assert table["key"].to_pylist() == keys
    assert table.schema.field("embedding").type == pyarrow.list_(pyarrow.float32(), 64)
    for row in table.to_pylist():
        content = (pictures / row["key"]).read_bytes()
        assert row["sha256"] == hashlib.sha256(content).hexdigest()
        pixels = transform(Image.open(pictures / row["key"]).convert("RGB"))
        with torch.no_grad():
            wanted = made(pixels[None])[0]
        torch.testing.assert_close(torch.tensor(row["embedding"]), wanted, rtol=1e-4, atol=1e-4)


def test_the_manifest_describes_the_files(whole):
    manifest = manifest_of(whole)
    assert manifest["complete"] is True and manifest["strategy"] is None
    assert manifest["counts"] == {"found": 9, "embedded": 9, "skipped": 0, "non_finite": 0}
    assert manifest["model"]["dimension"] == 64 and manifest["preprocessing"]["kind"] == "timm"
    shards = [f"images/shard-{i:06d}.parquet" for i in range(3)]
    assert [entry["file"] for entry in manifest["files"]] == [*shards, "skipped.parquet"]
    for entry in manifest["files"]:
        content = (whole / entry["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        assert len(content) == entry["bytes"]


def test_images_that_cannot_be_read_are_listed_with_the_reason(damaged, model, tmp_path):
    options = SMALL | {"workers": 1}
    result = elip_models.embed(model, damaged, tmp_path / "out", **options)
    assert (result.found, result.embedded, result.skipped) == (13, 9, 4)
    table = parquet.read_table(tmp_path / "out" / "skipped.parquet").to_pydict()
    reasons = dict(zip(table["key"], table["reason"], strict=True))
    assert sorted(reasons) == SKIPPED and "empty file" in reasons["empty.png"]
    assert "No such file" in reasons["gone.png"]
    assert "not a readable image" in reasons["text.jpg"]
    again = elip_models.embed(model, damaged, tmp_path / "out", **options)
    assert again.images_per_second is None and again.skipped == 4


def test_embeddings_with_nan_are_skipped_counted_and_an_error(
    pictures, model, tmp_path, monkeypatch, capsys
):
    call = encoders.Encoder.__call__

    def with_nan(self, pixels):
        features = call(self, pixels)
        features[0, 0] = torch.nan if len(features) == 2 else 0
        return features

    monkeypatch.setattr(encoders.Encoder, "__call__", with_nan)
    assert elip(*command(pictures, model, tmp_path / "out")) == 1
    printed = capsys.readouterr()
    assert "6 of 9 images embedded" in printed.out
    assert printed.err.startswith("error: 3 embeddings have NaN")
    reasons = parquet.read_table(tmp_path / "out" / "skipped.parquet")["reason"].to_pylist()
    assert reasons == ["the embedding has NaN or infinity"] * 3
    assert manifest_of(tmp_path / "out")["counts"]["non_finite"] == 3


def test_a_run_that_embeds_no_image_is_an_error(model, tmp_path, capsys):
    (tmp_path / "list.json").write_text('["missing.png"]')
    assert elip(*command(tmp_path / "list.json", model, tmp_path / "out")) == 1
    printed = capsys.readouterr()
    assert "0 of 1 images embedded" in printed.out
    assert printed.err.startswith("error: no image was embedded")


def test_float16_is_stored_and_overflow_is_not_finite(
    whole, pictures, encoder, tmp_path, monkeypatch
):
    options = SMALL | {"embedding_dtype": "float16"}
    elip_models.embed(encoder, pictures, tmp_path / "half", **options)
    table = embedded(tmp_path / "half")
    assert table.schema.field("embedding").type == pyarrow.list_(pyarrow.float16(), 64)
    half, single = (np.array(rows["embedding"].to_pylist()) for rows in (table, embedded(whole)))
    np.testing.assert_allclose(half, single, rtol=1e-3, atol=1e-3)
    call = encoders.Encoder.__call__
    monkeypatch.setattr(encoders.Encoder, "__call__", lambda self, x: call(self, x) * 1e5)
    assert elip_models.embed(encoder, pictures, tmp_path / "big", **options).non_finite == 9


def test_the_check_compares_dense_and_reduced_embeddings(pictures, model, tmp_path, capsys):
    options = ["--reduce", "tome", "--keep", "0.6"]
    assert elip(*command(pictures, model, tmp_path / "out", *options, "--min-cosine", 1.0)) == 2
    printed = capsys.readouterr().err
    assert "9 images dense and reduced: cosine" in printed
    assert "error: --min-cosine: expected a mean cosine of at least 1" in printed
    assert not list((tmp_path / "out").glob("images/*"))
    options[-1] = "0.9"  # another keep in the same folder, since nothing was written
    assert elip(*command(pictures, model, tmp_path / "out", *options, "--min-cosine", 0)) == 0
    checked = json.loads((tmp_path / "out" / "check.json").read_text())
    assert checked["images"] == 9 and 0 < checked["cosine"]["mean"] < 1
    assert checked["time_ratio"] > 0
    assert manifest_of(tmp_path / "out")["strategy"]["strategy"] == "tome"


WRONG = {
    "batch_size": (0, "batch_size: expected at least 1, got 0"),
    "reduce": ("tomme", "reduce: .*did you mean 'tome'"),
    "device": ("meta", "device: expected one of this machine, such as 'cuda:1' or 'cpu'"),
    "keep_columns": (["label"], "source: .*label"),
    "min_cosine": (0.9, "min_cosine: expected none with check=0, .*got 0.9; leave out one"),
    "ray_actors": (2, "ray_actors: expected none without ray, got 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name, pictures, model, tmp_path):
    value, message = WRONG[name]
    with pytest.raises(ConfigError, match=message):
        elip_models.embed(model, pictures, tmp_path / "out", **SMALL | {name: value})


OF_ENCODER = {
    "precision": "bf16",
    "compile": True,
    "preprocess": "clip",
    "device": "cpu",
    "pretrained": False,
}


@pytest.mark.parametrize("name", OF_ENCODER)
def test_an_option_of_the_model_beside_an_encoder_is_an_error(name, pictures, encoder, tmp_path):
    option = {name: OF_ENCODER[name]}
    with pytest.raises(ConfigError, match=f"^{name}: expected the default with an Encoder"):
        elip_models.embed(encoder, pictures, tmp_path / "out", **option, **SMALL)
    assert not (tmp_path / "out").exists()


# a run that is stopped


def flipped(folder):
    path = folder / "images" / "shard-000001.parquet"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def unfinished(folder):
    saved = read_checked(folder / "manifest.json")
    saved |= {"complete": False, "counts": None, "files": None}
    write_checked(folder / "manifest.json", saved)


DAMAGES = {
    "flipped byte": flipped,
    "other shard": lambda folder: shutil.copy(
        folder / "images" / "shard-000000.parquet", folder / "images" / "shard-000001.parquet"
    ),
    "cut": lambda folder: (folder / "images" / "shard-000001.parquet").write_bytes(b"PAR1"),
    "missing": lambda folder: (folder / "images" / "shard-000001.parquet").unlink(),
    "missing checksum": lambda folder: next(folder.glob("checksums/*1.parquet.sha256")).unlink(),
    "skipped": lambda folder: (folder / "skipped.parquet").write_bytes(b"PAR1"),
    "flipped in a stopped run": lambda folder: (flipped(folder), unfinished(folder)),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_swapped_shard_is_named_and_written_again(
    name, whole, pictures, encoder, tmp_path
):
    out = shutil.copytree(whole, tmp_path / "out")
    DAMAGES[name](out)
    lines, shown = [], []
    progress = {"progress": lambda *counts: shown.append(counts), "report": lines.append}
    elip_models.embed(encoder, pictures, out, **SMALL, **progress)
    assert files_of(out) == files_of(whole)
    if name != "skipped":
        assert shown[0] == (6, 0, 9) and shown[-1] == (9, 0, 9)
        assert name == "missing" or "images/shard-000001.parquet" in lines[0]


def test_a_second_run_in_the_folder_is_one_line(whole, pictures, model, capsys):
    with FileLock(whole / ".lock"):
        assert elip(*command(pictures, model, whole)) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "--output: expected a folder that no other run uses" in printed


def test_other_settings_are_refused_with_both_named(whole, pictures, model, tmp_path):
    before = files_of(whole)
    (tmp_path / "a.png").write_bytes((pictures / "0.png").read_bytes())
    weights = torch.load(model.partition("vit:")[2], weights_only=True)
    torch.save(weights | {"cls_token": weights["cls_token"] + 1}, tmp_path / "other.pt")
    other = f"timm:test_vit:{tmp_path}/other.pt"
    for name, source, options, message in (
        (model, pictures, {"reduce": "tome"}, "strategy: None there.*'tome' now"),
        (model, pictures, {"embedding_dtype": "float16"}, "'float32' there, 'float16' now"),
        (model, tmp_path, {}, r"source.found: 9 there, 1 now; source.sha256"),
        (other, pictures, {}, r"model.name: .* there, .*other.pt' now; model.weights"),
    ):
        with pytest.raises(ConfigError, match=message):
            elip_models.embed(name, source, whole, **SMALL | options)
    assert files_of(whole) == before


def test_other_files_are_refused_and_stay(pictures, encoder, tmp_path):
    own = tmp_path / ".manifest.json.bak"
    own.write_text("mine")
    for folder, message in (
        (tmp_path, r"a new or empty folder.*json.bak"),
        (own, "a folder that can be written.*File exists"),
        (pictures / "sub" / "out", "a folder outside the source"),
    ):
        with pytest.raises(ConfigError, match=f"output: expected {message}"):
            elip_models.embed(encoder, pictures, folder, **SMALL)
    assert not (pictures / "sub" / "out").exists() and own.read_text() == "mine"


def test_what_a_killed_run_left_is_removed_and_no_other_file(pictures, encoder, tmp_path):
    (tmp_path / "images").mkdir()
    left = (".manifest.json.7.7", "images/.shard-000001.parquet.7.7")
    for name in (*left, ".notes.1.2", "images/.mine.parquet"):
        (tmp_path / name).touch()
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(ConfigError, match=r"output: .*format: expected 3, got None"):
        elip_models.embed(encoder, pictures, tmp_path, **SMALL)
    assert (tmp_path / "manifest.json").read_text() == '{"name": "a web page"}'
    write_checked(tmp_path / "manifest.json", {"format": 3})
    elip_models.embed(encoder, pictures, tmp_path, **SMALL)
    assert {path.name for path in tmp_path.rglob(".*")} == {".lock", ".notes.1.2", ".mine.parquet"}


def test_a_full_disk_is_one_line_and_whole_shards_stay(
    whole, pictures, model, tmp_path, monkeypatch, capsys
):
    write, calls = output.write_file, []

    def full(path, content):
        calls.append(path)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(output, "write_file", full)
    assert elip(*command(pictures, model, tmp_path / "out")) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "No space left on device; the files that were written are whole" in printed
    assert elip(*command(pictures, model, tmp_path / "out")) == 0
    assert "3 of 9 images were embedded before" in capsys.readouterr().err
    assert files_of(tmp_path / "out") == files_of(whole)


@pytest.mark.slow
def test_two_processes_of_torchrun_give_the_same_bytes(whole, pictures, model, tmp_path):
    out = run_twice("elip_models.cli", *command(pictures, model, tmp_path / "out"))
    assert out.count("9 of 9 images embedded") == 1
    assert files_of(tmp_path / "out") == files_of(whole)


# the libraries of docs/collections.md that read the output

PAGE = Path(__file__).parents[2] / "docs" / "collections.md"
BLOCK = re.search(r"^```py\n(# pyarrow\n.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)[1]
READERS = dict(re.findall(r"^# (\w+)\n(.*?)(?=^# |\Z)", BLOCK, re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("library", ["pyarrow", "DuckDB", "polars", "datasets", "FAISS", "LanceDB"])
def test_the_lines_of_a_library_read_the_output(library, whole, tmp_path, monkeypatch):
    if find_spec(library.lower()) is None:
        pytest.skip(f"{library} is not installed; the tests need it for this block alone")
    shutil.copytree(whole, tmp_path / "embeddings")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = {}
    with own_process():
        exec(compile(READERS[library], library, "exec"), names)
    if "vectors" in names:
        assert names["vectors"].shape == (9, 64)
    if "index" in names:
        assert names["index"].ntotal == 9
