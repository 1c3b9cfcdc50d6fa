"""`elip index` and the index in a search; `elip search --compare` against a search in memory."""

import builtins
import json
import shutil

import numpy as np
import pytest
import torch

import elip_models
from elip_models.analysis.feature_measures import neighbours
from elip_models.embedding import index as indexes
from elip_models.embedding.collection import open_collection
from elip_models.embedding.compare import compare_neighbours
from elip_models.embedding.index import build_index, open_index
from elip_models.embedding.search import search
from elip_models.intervals import bootstrap_interval
from elip_models.validation import ConfigError
from tests.embedding.conftest import SMALL
from tests.helpers.embedding_folders import write_collection
from tests.helpers.tiny_run import elip

faiss = pytest.importorskip("faiss", reason="faiss is in the extra search")


@pytest.fixture(scope="module")
def vectors():
    return np.random.default_rng(0).standard_normal((600, 16)).astype(np.float32)


@pytest.fixture
def folder(vectors, tmp_path):
    return write_collection(tmp_path / "out", vectors, shard_size=250)


def test_the_command_builds_an_index_that_a_search_uses(whole, pictures, model, tmp_path, capsys):
    out = shutil.copytree(whole, tmp_path / "out")
    plain = search(out, pictures / "5.png", top=4)
    assert elip("index", out) == 0
    line = " ".join(capsys.readouterr().out.split())
    assert "HNSW index of 9 images; it finds 1.000 of the ten nearest images of an exact" in line
    found = search(out, pictures / "5.png", top=4)
    assert (plain.index, found.index) == (None, "HNSW")
    assert [hit.key for hit in found.hits] == [hit.key for hit in plain.hits]
    assert search(out, pictures / "5.png", top=4, exact=True) == plain
    assert elip_models.embed(model, pictures, out, **SMALL).images_per_second is None
    assert search(out, pictures / "5.png", top=4) == found
    assert elip("search", out, pictures / "5.png", "--top", "4") == 0
    assert "9 images, by the HNSW index" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["HNSW", "IVF"])
def test_an_index_finds_nearly_what_an_exact_search_finds(kind, folder, vectors, monkeypatch):
    if kind == "IVF":
        monkeypatch.setattr(indexes, "HNSW_IMAGES", 100)
        monkeypatch.setattr(indexes, "TRAINING_VECTORS", 4)
    seen = []
    built = build_index(folder, progress=lambda done, total: seen.append((done, total)))
    assert built.kind == kind and seen[-1] == (600, 600)
    found = open_index(open_collection(folder))
    assert found.kind == kind and found.recall == built.recall > 0.9
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    rows, cosines = found.nearest(unit[:20], 1)
    assert rows[:, 0].tolist() == list(range(20))
    np.testing.assert_allclose(cosines, 1, atol=1e-5)
    names = {path.name for path in (folder / "index").iterdir()}
    assert names == {"images.faiss", "index.json"}


def test_an_index_of_other_embeddings_is_not_used(folder, vectors):
    build_index(folder)
    shutil.copytree(folder / "index", folder.parent / "kept")
    shutil.rmtree(folder)
    write_collection(folder, vectors * 2, shard_size=250)
    shutil.move(folder.parent / "kept", folder / "index")
    lines = []
    assert open_index(open_collection(folder), lines.append) is None
    assert "is of other embeddings than the folder has now; all embeddings are" in lines[0]
    build_index(folder)
    assert open_index(open_collection(folder), lines.append) is not None and len(lines) == 1


def _cut(folder):
    path = folder / "index" / "images.faiss"
    path.write_bytes(path.read_bytes()[:-9])


def _overwrite(folder):
    path = folder / "index" / "images.faiss"
    path.write_bytes(b"none" + path.read_bytes()[4:])


def _other_vectors(folder):
    index = faiss.IndexHNSWFlat(16, 32)
    path = folder / "index" / "images.faiss"
    faiss.write_index(index, str(path))
    described = json.loads((folder / "index" / "index.json").read_text())
    described["bytes"] = path.stat().st_size
    (folder / "index" / "index.json").write_text(json.dumps(described))


def _describe(**changes):
    def damage(folder):
        path = folder / "index" / "index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def _without_kind(folder):
    path = folder / "index" / "index.json"
    described = json.loads(path.read_text())
    del described["kind"]
    path.write_text(json.dumps(described))


DAMAGES = {
    "cut": (_cut, "is damaged (images.faiss has not the size"),
    "overwritten": (_overwrite, "is damaged ("),
    "other vectors": (_other_vectors, "has other vectors than the embeddings"),
    "format": (_describe(format=2), "has not format 1"),
    "kind": (_without_kind, "has not format 1"),
    "json": (lambda folder: (folder / "index" / "index.json").write_text("["), "is damaged ("),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_index_is_not_used(name, folder):
    build_index(folder)
    damage, message = DAMAGES[name]
    damage(folder)
    lines = []
    assert open_index(open_collection(folder), lines.append) is None
    assert len(lines) == 1 and message in lines[0] and "builds it again" in lines[0]


def test_without_faiss_an_index_is_not_used_and_not_built(folder, monkeypatch):
    build_index(folder)
    monkeypatch.setattr(indexes, "find_spec", lambda name: None)
    lines = []
    assert open_index(open_collection(folder), lines.append) is None
    assert "needs faiss, pip install 'elip-kernels[search]'" in lines[0]
    imported = builtins.__import__

    def without_faiss(name, *arguments):
        if name == "faiss":
            raise ModuleNotFoundError("No module named 'faiss'", name="faiss")
        return imported(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_faiss)
    with pytest.raises(ImportError, match=r"elip index needs faiss: pip install 'elip-kernels\[se"):
        build_index(folder)


def test_an_index_that_cannot_be_written_leaves_no_index(folder, monkeypatch):
    build_index(folder)

    def fails(index, path):
        raise RuntimeError("Error in faiss\nwrite error: No space left on device")

    monkeypatch.setattr(faiss, "write_index", fails)
    with pytest.raises(ConfigError, match=r"folder: the index cannot be written .*No space left"):
        build_index(folder)
    assert open_index(open_collection(folder)) is None


def test_the_recall_is_the_share_of_neighbours_that_stay(vectors, tmp_path):
    noise = np.random.default_rng(1).standard_normal(vectors.shape).astype(np.float32)
    reduced = vectors + 0.3 * noise
    keys = [f"{i}.png" for i in range(600)]
    order = np.random.default_rng(2).permutation(600)
    write_collection(tmp_path / "dense", vectors, shard_size=250)
    write_collection(
        tmp_path / "reduced", reduced[order], keys=[keys[i] for i in order], shard_size=400
    )
    found = compare_neighbours(tmp_path / "dense", tmp_path / "reduced")
    shares = neighbours(torch.from_numpy(vectors), torch.from_numpy(reduced))
    wanted = bootstrap_interval(shares.double().numpy())
    np.testing.assert_allclose(found.recall, wanted, atol=1e-6)
    assert (found.queries, found.images, found.only_dense, found.only_reduced) == (600, 600, 0, 0)
    assert found.same_weights
    assert 0.3 < found.recall.low < found.recall.mean < found.recall.high < 1
    part = compare_neighbours(tmp_path / "dense", tmp_path / "reduced", queries=50, seed=3)
    again = compare_neighbours(tmp_path / "dense", tmp_path / "reduced", queries=50, seed=3)
    other = compare_neighbours(tmp_path / "dense", tmp_path / "reduced", queries=50, seed=4)
    assert part == again and part.recall != other.recall
    assert part.queries == 50 and part.recall.low < found.recall.mean < part.recall.high


def test_images_that_one_folder_has_not_are_left_out_and_counted(vectors, tmp_path, capsys):
    keys = [f"{i}.png" for i in range(600)]
    sha256 = ["changed" if i == 7 else key for i, key in enumerate(keys)]
    dense, reduced = tmp_path / "dense", tmp_path / "reduced"
    write_collection(dense, vectors[:500], keys=keys[:500])
    write_collection(reduced, vectors[3:], keys=keys[3:], sha256=sha256[3:])
    found = compare_neighbours(dense, reduced, queries=100)
    assert (found.only_dense, found.only_reduced, found.changed) == (3, 100, 1)
    assert found.images == 496 and found.recall == (1.0, 1.0, 1.0)
    assert elip("search", "--compare", dense, reduced, "--queries", "100") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "neighbours kept, of 10: 1.0000 (95% CI 1.0000 to 1.0000, 100 queries" in printed
    assert f"images only in {dense}, which are left out: 3 " in printed
    assert f"images only in {reduced}, which are left out: 100 " in printed
    assert "images with the same key and other bytes, which are left out: 1" in printed
    assert elip("search", "--compare", dense, reduced, "--queries", "100", "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found.as_json()))


def test_too_few_images_in_common_are_an_error(vectors, tmp_path, capsys):
    write_collection(tmp_path / "a", vectors[:12])
    write_collection(tmp_path / "b", vectors[:20, :8], keys=[f"{i}.png" for i in range(2, 22)])
    assert elip("search", "--compare", tmp_path / "a", tmp_path / "b") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "--top: expected fewer than the 10 images that" in error and "got 10" in error
    assert elip("search", "--compare", tmp_path / "a", tmp_path / "b", "--top", "9") == 0
    with pytest.raises(ConfigError, match="queries: expected an integer at least 1, got 0"):
        compare_neighbours(tmp_path / "a", tmp_path / "b", queries=0)
