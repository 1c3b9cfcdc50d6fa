"""`embed` writes what the model returns, and lists what it cannot read."""

import hashlib
import json
import sys
from dataclasses import replace

import pyarrow
import pytest
import timm
import torch
from PIL import Image
from pyarrow import parquet

import elip_models
from elip_models.embedding import encoder as encoders
from elip_models.embedding import run
from elip_models.embedding.encoder import open_encoder
from elip_models.validation import ConfigError
from tests.embedding.conftest import READABLE, SMALL, embedded, files_of
from tests.helpers.tiny_run import elip

SKIPPED = ["cut.png", "empty.png", "gone.png", "text.jpg"]


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
    for key, vector, digest in zip(*(table[name] for name in table.column_names), strict=True):
        content = (pictures / key.as_py()).read_bytes()
        assert digest.as_py() == hashlib.sha256(content).hexdigest()
        pixels = transform(Image.open(pictures / key.as_py()).convert("RGB"))
        with torch.no_grad():
            wanted = made(pixels[None])[0]
        torch.testing.assert_close(torch.tensor(vector.as_py()), wanted, rtol=1e-4, atol=1e-4)


def test_the_manifest_describes_the_files(whole):
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["complete"] is True and manifest["strategy"] is None
    assert manifest["counts"] == {"found": 9, "embedded": 9, "skipped": 0, "non_finite": 0}
    assert manifest["model"]["dimension"] == 64 and manifest["preprocessing"]["kind"] == "timm"
    shards = [f"images/shard-{i:06d}.parquet" for i in range(3)]
    assert [each["file"] for each in manifest["files"]] == [*shards, "skipped.parquet"]
    for each in manifest["files"]:
        content = (whole / each["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == each["sha256"]
        assert len(content) == each["bytes"]


def test_worker_processes_give_the_same_bytes(whole, pictures, model, tmp_path):
    elip_models.embed(model, pictures, tmp_path, **SMALL | {"workers": 1})
    assert files_of(tmp_path) == files_of(whole)


def test_images_that_cannot_be_read_are_listed_with_the_reason(damaged, model, tmp_path):
    found = elip_models.embed(model, damaged, tmp_path / "out", **SMALL)
    assert (found.found, found.embedded, found.skipped) == (13, 9, 4)
    table = parquet.read_table(tmp_path / "out" / "skipped.parquet").to_pydict()
    reasons = dict(zip(table["key"], table["reason"], strict=True))
    assert sorted(reasons) == SKIPPED
    for key, reason in (
        ("empty.png", "empty file"),
        ("gone.png", "no such file"),
        ("text.jpg", "not a readable image"),
    ):
        assert reason in reasons[key]
    again = elip_models.embed(model, damaged, tmp_path / "out", **SMALL)
    assert again.images_per_second is None and again.skipped == 4


@pytest.mark.slow
def test_a_source_without_a_readable_image_has_empty_shards(model, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"")
    found = elip_models.embed(model, tmp_path / "in", tmp_path / "out", **SMALL)
    assert (found.embedded, found.skipped) == (0, 1)
    assert embedded(tmp_path / "out").schema.field("embedding").type.list_size == 64


def test_embeddings_with_nan_are_skipped_counted_and_an_error(
    pictures, model, tmp_path, monkeypatch, capsys
):
    call = encoders.Encoder.__call__

    def with_nan(self, pixels):
        found = call(self, pixels)
        found[0, 0] = torch.nan if len(found) == 2 else 0
        return found

    monkeypatch.setattr(encoders.Encoder, "__call__", with_nan)
    options = ["--batch-size", 2, "--workers", 0]
    assert elip("embed", pictures, "--model", model, "--output", tmp_path / "out", *options) == 1
    said = capsys.readouterr()
    assert "5 of 9 images embedded" in said.out and said.err.startswith("error: 4 embeddings have")
    reasons = parquet.read_table(tmp_path / "out" / "skipped.parquet")["reason"].to_pylist()
    assert reasons == ["the embedding has NaN or infinity"] * 4
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["counts"]["non_finite"] == 4


def test_float16_that_overflows_is_not_finite(pictures, model, tmp_path, monkeypatch):
    call = encoders.Encoder.__call__
    monkeypatch.setattr(encoders.Encoder, "__call__", lambda self, x: call(self, x) * 1e5)
    options = SMALL | {"embedding_dtype": "float16"}
    found = elip_models.embed(model, pictures, tmp_path, **options)
    assert found.non_finite == found.skipped == 9


@pytest.mark.slow
def test_float16_is_stored(whole, pictures, model, tmp_path):
    elip_models.embed(model, pictures, tmp_path, **SMALL | {"embedding_dtype": "float16"})
    assert embedded(tmp_path).schema.field("embedding").type == pyarrow.list_(pyarrow.float16(), 64)
    found, wanted = (
        torch.tensor(embedded(each)["embedding"].to_pylist()) for each in (tmp_path, whole)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_columns_of_the_source_are_kept(pictures, model, tmp_path):
    rows = [{"path": str(pictures / f"{i}.png"), "key": f"k{i}", "label": i} for i in (0, 1)]
    rows.insert(1, {"path": "missing.png", "key": "gone", "label": 7})
    (tmp_path / "list.json").write_text(json.dumps(rows))
    options = SMALL | {"keep_columns": ["label"]}
    elip_models.embed(model, tmp_path / "list.json", tmp_path / "out", **options)
    found = embedded(tmp_path / "out")
    assert found["key"].to_pylist() == ["k0", "k1"] and found["label"].to_pylist() == [0, 1]


def test_the_check_compares_dense_and_reduced_embeddings(pictures, model, tmp_path):
    said = []
    options = SMALL | {"check": 20, "report": said.append}
    found = elip_models.embed(model, pictures, tmp_path, reduce="tome", keep=0.6, **options)
    assert found.check.images == 9 and found.check.neighbours is None
    assert 0 < found.check.cosine.mean < 1 and found.check.time_ratio > 0
    assert "9 images dense and reduced: cosine" in said[0]
    saved = json.loads((tmp_path / "check.json").read_text())
    assert saved["cosine"]["mean"] == found.check.cosine.mean
    strategy = json.loads((tmp_path / "manifest.json").read_text())["strategy"]
    assert strategy["strategy"] == "tome"


def test_a_cosine_that_is_too_low_stops_and_another_keep_runs(pictures, model, tmp_path, capsys):
    arguments = ["embed", pictures, "--model", model, "--output", tmp_path / "out"]
    options = ["--reduce", "random", "--workers", 0]
    assert elip(*arguments, *options, "--keep", 0.3, "--min-cosine", 1.0) == 2
    assert "error: --min-cosine: expected a mean cosine of at least 1" in capsys.readouterr().err
    assert not list((tmp_path / "out" / "images").glob("*"))
    assert elip(*arguments, *options, "--keep", 0.9, "--min-cosine", 0) == 0


@pytest.mark.slow
def test_a_file_of_calibrate_is_read(pictures, model, tmp_path):
    from elip_models.reduction.serialization import settings_of
    from elip_models.saving.files import write_json

    write_json(tmp_path / "calibrated.json", settings_of(elip_models.ToMe(r=2)))
    elip_models.embed(
        model, pictures, tmp_path / "out", reduce=str(tmp_path / "calibrated.json"), **SMALL
    )
    strategy = json.loads((tmp_path / "out" / "manifest.json").read_text())["strategy"]
    assert strategy["settings"]["r"] == 2


WRONG = {
    "batch_size": (0, "batch_size: expected an integer"),
    "embedding_dtype": ("int8", "embedding_dtype: expected"),
    "min_cosine": (2, "min_cosine: expected"),
    "preprocess": ("imagnet", "preprocess: expected 'imagenet', 'clip' or a JSON file"),
    "reduce": ("tomme", "reduce: .*did you mean 'tome'"),
    "device": ("gpu", "device: expected one of this machine, such as 'cuda:1' or 'cpu', got 'gpu'"),
    "texts": ("missing.txt", "texts: .*missing.txt"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name, pictures, model, tmp_path):
    value, message = WRONG[name]
    with pytest.raises(ConfigError, match=message):
        elip_models.embed(model, pictures, tmp_path / "out", **SMALL | {name: value})


def test_an_encoder_takes_no_further_reduction(pictures, model, tmp_path):
    for options in ({"reduce": "tome"}, {"keep": 0.5}, {"preprocess": "clip"}):
        (name,) = options
        with pytest.raises(ConfigError, match=f"{name}: expected none with an Encoder"):
            elip_models.embed(open_encoder(model), pictures, tmp_path, **SMALL, **options)


def test_a_missing_extra_is_one_sentence(pictures, monkeypatch, tmp_path, capsys):
    for name in [name for name in sys.modules if name.startswith("elip_models.embedding")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    arguments = ["embed", pictures, "--model", "timm:test_vit", "--output", tmp_path / "out"]
    assert elip(*arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "needs pyarrow: pip install 'elip-kernels[embed]'" in said


def test_an_image_that_cannot_be_preprocessed_is_listed(pictures, model, tmp_path):
    encoder = open_encoder(model)
    plain = encoder.preprocessing.transform

    def transform(image):
        if image.width == 64:
            raise ValueError("an odd shape")
        return plain(image)

    odd = replace(encoder, preprocessing=encoder.preprocessing._replace(transform=transform))
    found = elip_models.embed(odd, pictures, tmp_path, **SMALL)
    table = parquet.read_table(tmp_path / "skipped.parquet").to_pydict()
    assert found.skipped == 1 and table["key"] == ["sub/a.jpg"]
    assert table["reason"] == ["cannot be preprocessed: an odd shape"]


def test_texts_need_an_image_text_model(pictures, model, tmp_path):
    (tmp_path / "captions.txt").write_text("a dog\n")
    with pytest.raises(ConfigError, match="texts: expected an image-text model"):
        elip_models.embed(
            model, pictures, tmp_path / "out", texts=tmp_path / "captions.txt", **SMALL
        )


def test_the_sum_is_asserted_at_the_end(pictures, model, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "embed_shard", lambda *arguments, **options: [])
    with pytest.raises(RuntimeError, match="expected 9 images, embedded or skipped, got 0 and 0"):
        elip_models.embed(model, pictures, tmp_path, **SMALL)
