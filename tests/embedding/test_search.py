"""`elip search` finds what a search in memory finds, and refuses what it cannot search."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import timm
import torch
from PIL import Image
from pyarrow import parquet

import elip_models
from elip_models.embedding import collection as collections
from elip_models.embedding import neighbours
from elip_models.embedding.collection import open_collection
from elip_models.embedding.contact_sheet import contact_sheet
from elip_models.embedding.encoder import open_encoder
from elip_models.embedding.neighbours import nearest
from elip_models.embedding.query import Query
from elip_models.embedding.search import Found, Hit, search
from elip_models.pretraining.models.registry import create_model
from elip_models.validation import ConfigError
from tests.embedding.conftest import READABLE, SMALL, embedded
from tests.helpers.embedding_folders import write_collection
from tests.helpers.tiny_run import elip


def vectors_of(table):
    found = np.array(table["embedding"].to_pylist(), np.float64)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def captioned(pictures, tokenizer, tmp_path_factory):
    """The embeddings of an image-text model that reduces, and the folder of its run."""
    folder = tmp_path_factory.mktemp("captioned")
    torch.manual_seed(0)
    create_model("elip_clip_tiny").eval().save_pretrained(folder / "run" / "model", tokenizer)
    elip_models.embed(str(folder / "run"), pictures, folder / "out", **SMALL)
    return folder / "out", folder / "run"


def test_an_image_of_the_collection_finds_itself_first(whole, pictures):
    found = search(whole, pictures / "sub" / "a.jpg", top=5)
    assert found.images == READABLE and found.index is None
    assert found.hits[0].key == "sub/a.jpg" and found.hits[0].similarity > 1 - 1e-5
    assert found.hits[0].path == str(pictures / "sub" / "a.jpg")
    vectors, keys = vectors_of(embedded(whole)), embedded(whole)["key"].to_pylist()
    cosines = vectors @ vectors[keys.index("sub/a.jpg")]
    wanted = [keys[i] for i in np.argsort(-cosines)[:5]]
    assert [hit.key for hit in found.hits] == wanted
    similarities = [hit.similarity for hit in found.hits]
    np.testing.assert_allclose(similarities, np.sort(cosines)[::-1][:5], atol=1e-5)
    assert [hit.rank for hit in found.hits] == [1, 2, 3, 4, 5]


def test_a_text_is_embedded_by_the_text_tower(captioned, capsys):
    out, run = captioned
    assert json.loads((out / "manifest.json").read_text())["strategy"]["strategy"] == "elip"
    found = search(out, "two dogs on a beach", top=3)
    encoder = open_encoder(str(run))
    text = encoder.encode_texts(["two dogs on a beach"])[0].double().numpy()
    cosines = vectors_of(embedded(out)) @ (text / np.linalg.norm(text))
    wanted = np.argsort(-cosines)[:3]
    assert [hit.key for hit in found.hits] == [embedded(out)["key"][i].as_py() for i in wanted]
    np.testing.assert_allclose([hit.similarity for hit in found.hits], cosines[wanted], atol=1e-5)
    again = search(out, "two dogs on a beach", top=3, model=encoder)
    assert again.hits == found.hits
    assert elip("search", out, "two dogs on a beach", "--top", "3", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(found.as_json()))


def test_an_image_is_embedded_with_the_reduction_of_the_manifest(pictures, model, tmp_path):
    options = SMALL | {"preprocess": "clip"}
    elip_models.embed(model, pictures, tmp_path, reduce="tome", keep=0.5, **options)
    found = search(tmp_path, pictures / "3.png", top=1)
    assert found.hits[0].key == "3.png" and found.hits[0].similarity > 1 - 1e-5


def test_the_search_is_exact_and_the_first_of_equals_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(collections, "ROWS", 7)
    monkeypatch.setattr(neighbours, "QUERIES", 1)
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((50, 8)).astype("float16").astype("float32")
    vectors[[40, 17]] = vectors[3] * 2
    write_collection(tmp_path, vectors, shard_size=20)
    found = open_collection(tmp_path)
    assert max(len(each) for _, each in found.chunks()) == 7
    queries = found.take([3, 30])
    rows, cosines = nearest(found, queries, 12)
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors, axis=1, keepdims=True)
    for i, own in enumerate((3, 30)):
        wanted = np.sort(unit @ unit[own])[::-1][:12]
        np.testing.assert_allclose(cosines[i], wanted, atol=1e-6)
        np.testing.assert_allclose((unit @ unit[own])[rows[i]], wanted, atol=1e-6)
    assert sorted(rows[0][:3]) == [3, 17, 40]
    among = np.arange(50) % 2 == 0
    rows, _ = nearest(found, queries, 5, among=among, without=[40, 30])
    assert (rows % 2 == 0).all() and 40 not in rows[0] and 30 not in rows[1]
    assert found.keys([49, 0, 21]) == ["49.png", "0.png", "21.png"]


def test_a_vector_without_direction_is_similar_to_nothing(tmp_path):
    vectors = np.array([[0, 0], [1e-30, 0], [3e38, 3e38]], np.float32)
    write_collection(tmp_path, vectors)
    rows, cosines = nearest(open_collection(tmp_path), np.array([[1, 0]], np.float32), 3)
    assert rows.tolist() == [[1, 2, 0]]
    np.testing.assert_allclose(cosines, [[1, 0.5**0.5, 0]], atol=1e-6)


def test_the_embeddings_are_never_in_memory_together(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((40_000, 64)).astype(np.float32)
    write_collection(tmp_path, vectors, shard_size=20_000)
    found, pool = open_collection(tmp_path), pyarrow.default_memory_pool()
    before, most = pool.bytes_allocated(), 0
    for _, chunk in found.chunks():
        assert len(chunk) <= collections.ROWS
        most = max(most, pool.bytes_allocated() - before)
    assert 0 < most < vectors.nbytes / 2


def test_a_model_that_moved_is_named_by_the_option(whole, pictures, model, tmp_path, capsys):
    moved = tmp_path / "moved.pt"
    shutil.copy(model.partition("vit:")[2], moved)
    out = shutil.copytree(whole, tmp_path / "out")
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["model"]["name"] = "timm:test_vit:gone.pt"
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert elip("search", out, pictures / "0.png") == 2
    error = capsys.readouterr().err
    assert "--model: expected the model that the embeddings name, 'timm:test_vit:gone.pt'" in error
    assert error.count("\n") == 1
    arguments = ["search", out, pictures / "0.png", "--model", f"timm:test_vit:{moved}"]
    assert elip(*arguments, "--top", "2") == 0
    printed = capsys.readouterr()
    assert re.search(r"1 *│ *1.0000 *│ *0.png", printed.out)
    assert "9 images, all compared" in printed.out


def test_other_weights_are_refused_with_both_named(whole, pictures, model, tmp_path):
    torch.manual_seed(1)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "other.pt")
    other = f"timm:test_vit:{tmp_path / 'other.pt'}"
    message = f"model: expected the weights .*{model}.*SHA-256 [0-9a-f]{{16}}.*{other}"
    with pytest.raises(ConfigError, match=message):
        search(whole, pictures / "0.png", model=other)
    with pytest.raises(ConfigError, match=message):
        search(whole, pictures / "0.png", model=open_encoder(other))


def test_another_preprocessing_of_the_same_weights_is_refused(whole, pictures, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["preprocessing"]["mean"] = [0.1, 0.2, 0.3]
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"model: expected the preprocessing .* another mean of"):
        search(out, pictures / "0.png")


def test_more_images_than_there_are_is_said(whole, pictures, capsys):
    assert elip("search", whole, pictures / "0.png", "--json") == 0
    printed = capsys.readouterr()
    assert "has 9 images, fewer than 10; all are shown" in printed.err
    assert len(json.loads(printed.out)["hits"]) == READABLE


def test_the_contact_sheet_has_thumbnails_and_escapes_everything(whole, pictures, tmp_path):
    page = tmp_path / "found.html"
    assert elip("search", whole, pictures / "0.png", "--top", "4", "--html", page) == 0
    sources = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page.read_text())
    assert len(sources) == 5  # with that of the query
    with Image.open(io.BytesIO(base64.b64decode(sources[1]))) as image:
        assert image.size == (40, 30)
    hits = (Hit(1, 0.5, "<script>\"&'", None), Hit(2, 0.4, "gone.png", '/no/"><b>.png'))
    query = Query("text", "</title><script>alert(1)</script>{}")
    text = contact_sheet(Found(tmp_path / "<i>", query, 2, None, hits))
    assert "<script" not in text and "<i>" not in text and '"><b>.png' not in text
    assert "&lt;script&gt;&quot;&amp;&#x27;" in text and "<img" not in text
    assert re.findall(r"(?:src|href)=\S*", text) == []


BAD_QUERIES = {
    "a dog": "query: expected the path of an image, since 'timm:test_vit:.*' embeds no texts",
    "gone.jpg": "query: expected a text or the path of an image, got no file 'gone.jpg'",
    " ": "query: expected a text or the path of an image, got ' '",
    "\ud800": "query: expected Unicode text",
    3: "query: expected a text or a path, got 3",
}


@pytest.mark.parametrize("query", BAD_QUERIES, ids=repr)
def test_a_wrong_query_is_an_error(whole, query):
    with pytest.raises(ConfigError, match=BAD_QUERIES[query]):
        search(whole, query)


def test_an_image_that_cannot_be_read_is_an_error(whole, damaged):
    with pytest.raises(ConfigError, match=r"query: expected a readable image, got '.*: not a re"):
        search(whole, damaged / "text.jpg")
    with pytest.raises(ConfigError, match=r"query: expected a readable image, got .*no such file"):
        search(whole, damaged / "nothing.jpg")
    with pytest.raises(ConfigError, match="top: expected an integer at least 1, got 0"):
        search(whole, damaged / "1.png", top=0)


def _manifest(**changes):
    def damage(folder):
        saved = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(saved | changes))

    return damage


def _shard(**columns):
    """Return a function that replaces columns of a shard, whose size the manifest then has."""

    def damage(folder):
        path = folder / "images" / "shard-000001.parquet"
        table = parquet.read_table(path)
        for name, values in columns.items():
            table = table.set_column(table.schema.names.index(name), name, values)
        parquet.write_table(table, path)
        saved = json.loads((folder / "manifest.json").read_text())
        saved["files"][1]["bytes"] = path.stat().st_size
        (folder / "manifest.json").write_text(json.dumps(saved))

    return damage


def _lists(*rows, dtype=None):
    values = pyarrow.array([each for row in rows for each in row], dtype or pyarrow.float32())
    return pyarrow.FixedSizeListArray.from_arrays(values, len(rows[0]))


DAMAGES = {
    "no manifest": (
        lambda folder: (folder / "manifest.json").unlink(),
        "expected a folder of embeddings, which `elip embed` writes",
    ),
    "no json": (
        lambda folder: (folder / "manifest.json").write_text("{"),
        "expected a JSON object, got no valid JSON",
    ),
    "unfinished": (
        _manifest(complete=False, files=None, counts=None),
        "expected a finished run, got one that has not finished in .*continues it",
    ),
    "format": (_manifest(format=2), "format: expected 1, got 2"),
    "no model": (_manifest(model={"name": "x"}), "model.weights_sha256: expected a string"),
    "no files": (_manifest(files=[]), "expected at least one embedding, got none"),
    "no shard": (
        lambda folder: (folder / "images" / "shard-000001.parquet").unlink(),
        "shard-000001.parquet: no such file; remove the file, and the same `elip embed`",
    ),
    "cut": (
        lambda folder: (folder / "images" / "shard-000001.parquet").write_bytes(b"PAR1"),
        r"shard-000001.parquet: expected \d+ bytes, as in manifest.json, got 4",
    ),
    "width": (
        _shard(embedding=_lists([1, 2], [1, 2], [3, 4])),
        "expected lists of 4 numbers, as in manifest.json, got 2",
    ),
    "type": (_shard(embedding=pyarrow.array(["a"] * 3)), "in the column embedding, got string"),
    "NaN": (
        _shard(embedding=_lists([1] * 4, [1, 2, 3, float("nan")], [1] * 4)),
        "expected finite embeddings, got NaN or infinity in row 1",
    ),
    "none": (
        _shard(
            embedding=pyarrow.array(
                [[1.0] * 4, None, [1.0] * 4], pyarrow.list_(pyarrow.float32(), 4)
            )
        ),
        "expected lists of 4 numbers in each row, got none in some",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_one_sentence(name, tmp_path):
    write_collection(tmp_path, np.eye(6, 4, dtype=np.float32) + 1, shard_size=3)
    damage, message = DAMAGES[name]
    damage(tmp_path)
    with pytest.raises(ConfigError, match=f"(?s)^folder: .*{message}"):
        nearest(open_collection(tmp_path), np.ones((1, 4), np.float32), 2)


def test_a_shard_that_is_no_parquet_is_one_sentence(tmp_path):
    write_collection(tmp_path, np.eye(6, 4, dtype=np.float32) + 1, shard_size=3)
    path = tmp_path / "images" / "shard-000001.parquet"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(ConfigError, match=r"^folder: .*expected a whole Parquet file"):
        nearest(open_collection(tmp_path), np.ones((1, 4), np.float32), 2)


def test_an_empty_collection_is_one_sentence(tmp_path):
    write_collection(tmp_path, np.empty((0, 4), np.float32))
    with pytest.raises(ConfigError, match="folder: expected at least one embedding, got none"):
        open_collection(tmp_path)


def test_the_python_of_the_page_runs(whole, pictures, tmp_path, monkeypatch, capsys):
    (tmp_path / "photographs").mkdir()
    shutil.copy(pictures / "sub" / "a.jpg", tmp_path / "photographs" / "dog.jpg")
    shutil.copytree(whole, tmp_path / "embeddings")
    monkeypatch.chdir(tmp_path)
    names, page = {}, Path(__file__).parents[2] / "docs" / "search.md"
    for code in re.findall(r"^```py\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(code, "search.md", "exec"), names)
    assert capsys.readouterr().out.split()[2] == "sub/a.jpg"
    assert len(names["found"].hits) == READABLE


def test_the_command_names_its_arguments(whole, tmp_path, capsys):
    for arguments, message in (
        ([], "FOLDER: expected one, or --compare DENSE REDUCED, got none"),
        ([whole], "QUERY: expected one, or --compare DENSE REDUCED, got none"),
        ([tmp_path, "a dog"], "FOLDER: expected a folder of embeddings"),
        ([whole, "a dog"], "QUERY: expected the path of an image"),
        ([whole, "a dog", "--html", tmp_path / "no" / "page.html"], "--html: expected a file"),
        ([whole, "--compare", whole, whole], "FOLDER: expected none with --compare, got"),
        (["--compare", whole, whole, "--exact"], "--exact: expected none with --compare, got True"),
    ):
        assert elip("search", *arguments) == 2
        assert message in " ".join(capsys.readouterr().err.split())
