"""`elip search` finds what a search in memory finds, and checks the files that it reads."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import timm
import torch

import elip_models
from elip_models.embedding import search as searches
from elip_models.embedding.collection import open_collection
from elip_models.embedding.encoder import open_encoder
from elip_models.embedding.output import OutputFolder, as_arrow, shard_file
from elip_models.embedding.search import build_index, open_index, search
from elip_models.saving.files import read_checked, read_object, write_checked, write_json
from elip_models.validation import ConfigError
from tests.embedding.conftest import READABLE, SMALL, embedded
from tests.helpers.own_warnings import UNGUIDED
from tests.helpers.tiny_run import elip


def write_collection(folder, vectors, *, keys=None, sha256=None, shard_size=10_000):
    """Write the vectors (n, D) of images with the keys 0.png, 1.png and so on."""
    keys = [f"{i}.png" for i in range(len(vectors))] if keys is None else list(keys)
    sha256 = keys if sha256 is None else sha256
    output = OutputFolder(folder)
    model = {"name": "timm:none", "weights_sha256": "0", "has_text": False}
    source = {"kind": "tar", "location": "none.tar"}
    files = []
    with output.locked():
        model["dimension"] = vectors.shape[1]
        output.begin({"model": model, "strategy": None, "source": source})
        for first in range(0, max(1, len(vectors)), shard_size):
            rows = slice(first, first + shard_size)
            columns = {
                "key": pyarrow.array(keys[rows], pyarrow.string()),
                "embedding": as_arrow(np.asarray(vectors[rows])),
                "sha256": pyarrow.array(sha256[rows], pyarrow.string()),
            }
            files.append(shard_file(len(files)))
            output.write(files[-1], columns)
        output.complete(files, keys)
    return folder


def vectors_of(folder):
    vectors = np.array(embedded(folder)["embedding"].to_pylist(), np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def keys_of(result):
    return [hit.key for hit in result.hits]


def change_manifest(folder, **changes):
    write_checked(folder / "manifest.json", read_checked(folder / "manifest.json") | changes)


def test_an_image_of_the_collection_finds_itself_first(whole, pictures, encoder):
    result = search(whole, pictures / "sub" / "a.jpg", top=5, model=encoder)
    assert result.images == READABLE and result.index is None
    assert result.hits[0].path == str(pictures / "sub" / "a.jpg")
    vectors, keys = vectors_of(whole), embedded(whole)["key"].to_pylist()
    cosines = vectors @ vectors[keys.index("sub/a.jpg")]
    assert keys_of(result) == [keys[i] for i in np.argsort(-cosines)[:5]]
    similarities = [hit.similarity for hit in result.hits]
    np.testing.assert_allclose(similarities, np.sort(cosines)[::-1][:5], atol=1e-5)
    assert [hit.rank for hit in result.hits] == [1, 2, 3, 4, 5]


@UNGUIDED
def test_a_text_is_embedded_by_the_text_tower(captioned, capsys):
    out, run = captioned
    assert json.loads((out / "manifest.json").read_text())["strategy"]["strategy"] == "elip"
    result = search(out, "two dogs on a beach", top=3)
    text = open_encoder(str(run)).encode_texts(["two dogs on a beach"])[0].double().numpy()
    cosines = vectors_of(out) @ (text / np.linalg.norm(text))
    wanted = np.argsort(-cosines)[:3]
    assert keys_of(result) == [embedded(out)["key"][i].as_py() for i in wanted]
    np.testing.assert_allclose([hit.similarity for hit in result.hits], cosines[wanted], atol=1e-5)
    assert elip("search", out, "two dogs on a beach", "--top", "3", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert [hit["key"] for hit in printed["hits"]] == keys_of(result)


def test_an_image_is_embedded_with_reduction_and_preprocessing_of_the_manifest(
    pictures, model, tmp_path
):
    options = SMALL | {"preprocess": "clip"}
    elip_models.embed(model, pictures, tmp_path, reduce="tome", keep=0.5, **options)
    result = search(tmp_path, pictures / "3.png", top=1)
    assert keys_of(result) == ["3.png"] and result.hits[0].similarity > 1 - 1e-5


def test_a_search_in_several_shards_is_exact(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((50, 8)).astype("float16").astype("float32")
    write_collection(tmp_path, vectors, shard_size=20)
    collection = open_collection(tmp_path)
    queries = collection.take(np.array([3, 30]))
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines, rows = collection.search(queries, 12)
    for i, own in enumerate((3, 30)):
        wanted = np.argsort(-(unit @ unit[own]))[:12]
        assert rows[i].tolist() == wanted.tolist()
        np.testing.assert_allclose(cosines[i], (unit @ unit[own])[wanted], atol=1e-6)
    assert collection.keys([49, 0, 21]) == ["49.png", "0.png", "21.png"]


def test_other_weights_or_preprocessing_are_refused(whole, pictures, model, tmp_path):
    torch.manual_seed(1)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "other.pt")
    other = f"timm:test_vit:{tmp_path / 'other.pt'}"
    message = f"model: expected the weights .*{model}.*SHA-256 [0-9a-f]{{16}}.*{other}"
    for refused in (other, open_encoder(other)):
        with pytest.raises(ConfigError, match=message):
            search(whole, pictures / "0.png", model=refused)
    out = shutil.copytree(whole, tmp_path / "out")
    saved = json.loads((out / "manifest.json").read_text())["preprocessing"]
    change_manifest(out, preprocessing=saved | {"mean": [0.1, 0.2, 0.3]})
    with pytest.raises(ConfigError, match=r"model: expected the preprocessing of the embeddings"):
        search(out, pictures / "0.png")


BAD_QUERIES = {
    "a dog": "query: expected the path of an image, since 'timm:test_vit:.*' embeds no texts",
    "gone.jpg": "query: expected a text or the path of an image, got no file 'gone.jpg'",
    Path("gone.jpg"): "query: expected a readable image, got gone.jpg: no such file",
    Path(__file__): "query: expected a readable image, got .*: not a readable image",
}


@pytest.mark.parametrize("query", BAD_QUERIES, ids=str)
def test_a_wrong_query_is_an_error(whole, encoder, query):
    with pytest.raises(ConfigError, match=BAD_QUERIES[query]):
        search(whole, query, model=encoder)


def flipped(folder):
    path = folder / "images" / "shard-000001.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "no manifest": (
        lambda folder: (folder / "manifest.json").unlink(),
        "expected a folder of embeddings, which `elip embed` writes",
    ),
    "no json": (lambda folder: (folder / "manifest.json").write_text("{"), "no valid JSON"),
    "unfinished": (
        lambda folder: change_manifest(folder, complete=False, files=None),
        "expected a finished run, got one that has not finished in .*continues it",
    ),
    "format": (lambda folder: change_manifest(folder, format=4), r"format: expected 3, got 4"),
    "edited": (
        lambda folder: write_json(
            folder / "manifest.json", read_object(folder / "manifest.json") | {"source": 5}
        ),
        "manifest.json is not as it was written: its content has another SHA-256",
    ),
    "no model": (lambda folder: change_manifest(folder, model=[]), "what `elip embed` writes"),
    "no shards": (
        lambda folder: change_manifest(folder, files=[]),
        "expected at least one embedding, got none",
    ),
    "missing shard": (
        lambda folder: (folder / "images" / "shard-000001.parquet").unlink(),
        "shard-000001.parquet is not as it was written: .*the same `elip embed`",
    ),
    "flipped byte": (flipped, "shard-000001.parquet is not as it was written: its SHA-256"),
    "other shard": (
        lambda folder: shutil.copy(
            folder / "images" / "shard-000000.parquet", folder / "images" / "shard-000001.parquet"
        ),
        "shard-000001.parquet is not as it was written: its SHA-256",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_one_line(name, tmp_path):
    write_collection(tmp_path, np.eye(6, 4, dtype=np.float32) + 1, shard_size=3)
    damage, message = DAMAGES[name]
    damage(tmp_path)
    with pytest.raises(ConfigError, match=f"^folder: .*{message}"):
        open_collection(tmp_path).search(np.ones((1, 4), np.float32), 2)


# the index


@pytest.fixture(scope="module")
def vectors():
    return np.random.default_rng(0).standard_normal((600, 16)).astype(np.float32)


@pytest.fixture
def folder(vectors, tmp_path):
    return write_collection(tmp_path / "out", vectors, shard_size=250)


def test_the_command_builds_an_index_that_a_search_uses(whole, pictures, encoder, tmp_path, capsys):
    out = shutil.copytree(whole, tmp_path / "out")
    options = {"top": 4, "model": encoder}
    plain = search(out, pictures / "5.png", **options)
    assert elip("index", out) == 0
    line = " ".join(capsys.readouterr().out.split())
    assert "HNSW32 index of 9 images; it finds 1.000 of the ten nearest images of an exact" in line
    result = search(out, pictures / "5.png", **options)
    assert (plain.index, result.index) == (None, "HNSW32")
    assert keys_of(result) == keys_of(plain)
    assert search(out, pictures / "5.png", exact=True, **options) == plain
    assert elip_models.embed(encoder, pictures, out, **SMALL).images_per_second is None
    assert search(out, pictures / "5.png", **options) == result


@pytest.mark.parametrize("kind", ["HNSW", "IVF"])
def test_the_recall_of_an_index_is_measured(kind, folder, vectors, monkeypatch):
    monkeypatch.setattr(searches, "CHECKED_QUERIES", 600)
    if kind == "IVF":
        monkeypatch.setattr(searches, "HNSW_IMAGES", 100)
        monkeypatch.setattr(searches, "TRAINING_VECTORS", 4)
        monkeypatch.setattr(searches, "PROBES", 4)
    built = build_index(folder)
    collection = open_collection(folder)
    index = open_index(collection)
    assert index.kind == built.kind and kind in index.kind and index.recall == built.recall
    queries = collection.take(np.arange(600))
    rows = [searched.search(queries, 11)[1] for searched in (collection, index.vectors)]
    shares = [len({*a[1:]} & {*b[1:]}) / 10 for a, b in zip(*rows, strict=True)]
    assert index.recall == pytest.approx(np.mean(shares))
    assert 0.3 < index.recall < 0.9 if kind == "IVF" else index.recall > 0.95
    assert {path.name for path in (folder / "index").iterdir()} == {"images.faiss", "index.json"}


def other_vectors(folder):
    shutil.move(folder / "index", folder.parent / "kept")
    shutil.rmtree(folder)
    write_collection(folder, np.ones((600, 16), np.float32))
    shutil.move(folder.parent / "kept", folder / "index")


def flipped_index(folder):
    path = folder / "index" / "images.faiss"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


INDEX_DAMAGES = {
    "flipped byte": flipped_index,
    "cut": lambda folder: (folder / "index" / "images.faiss").write_bytes(b"none"),
    "json": lambda folder: (folder / "index" / "index.json").write_text("["),
    "other embeddings": other_vectors,
}


@pytest.mark.parametrize("name", INDEX_DAMAGES)
def test_a_damaged_index_is_not_used(name, folder):
    build_index(folder)
    INDEX_DAMAGES[name](folder)
    lines = []
    assert open_index(open_collection(folder), lines.append) is None
    assert len(lines) == 1 and "builds it again" in lines[0]
    build_index(folder)
    assert open_index(open_collection(folder), lines.append) is not None


def test_the_python_of_the_page_runs(whole, pictures, tmp_path, monkeypatch, capsys):
    (tmp_path / "photographs").mkdir()
    shutil.copy(pictures / "sub" / "a.jpg", tmp_path / "photographs" / "dog.jpg")
    shutil.copytree(whole, tmp_path / "embeddings")
    monkeypatch.chdir(tmp_path)
    names, page = {}, Path(__file__).parents[2] / "docs" / "search.md"
    for code in re.findall(r"^```py\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(code, page.name, "exec"), names)
    assert capsys.readouterr().out.split()[2] == "sub/a.jpg"
    assert len(names["result"].hits) == READABLE
