"""`embed` writes what the model returns, lists what it cannot read, and continues after a stop."""

import errno
import hashlib
import json
import os
import signal
import traceback
from functools import partial
from pathlib import Path

import pyarrow
import pytest
import timm
import torch
from PIL import Image
from pyarrow import parquet

import elip_models
from elip_models.cli import main
from elip_models.embedding import encoder as encoders
from elip_models.embedding import output, run
from elip_models.embedding.encoder import open_encoder
from elip_models.validation import ConfigError
from tests.embedding.conftest import READABLE
from tests.full_disk import fill
from tests.helpers.tiny_run import elip, own_process

SMALL = {"batch_size": 2, "shard_size": 3, "workers": 0, "check": 0}
SKIPPED = ["cut.png", "empty.png", "gone.png", "text.jpg"]


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


@pytest.mark.parametrize("missing", [[0], [1, 2], [0, 1, 2]])
def test_missing_and_damaged_shards_are_written_again(whole, pictures, model, tmp_path, missing):
    folder = tmp_path / "out"
    folder.mkdir()
    for name, content in files_of(whole).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    for number in missing:
        shard = folder / "images" / f"shard-{number:06d}.parquet"
        if number == 1:
            shard.write_bytes(shard.read_bytes()[:100])
        else:
            shard.unlink()
    shown = []
    elip_models.embed(model, pictures, folder, **SMALL, progress=lambda *at: shown.append(at))
    assert files_of(folder) == files_of(whole)
    assert shown[0] == (9 - 3 * len(missing), 0) and shown[-1] == (9, 0)


def killed_at(number, after):
    """Replace os.replace by one that kills this process at a call, before or after it."""
    replace, calls = os.replace, []

    def replacing(*arguments):
        calls.append(arguments)
        if len(calls) == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*arguments)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replacing


def in_child(work):
    """Run a function in a forked process; return its exit status."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the process is forked")
def test_a_killed_run_continues_to_the_same_bytes(whole, pictures, model, tmp_path):
    """Six files are renamed into place: the manifest, three shards, the skipped list, and the
    manifest again. The process is killed before or after each, one time after the other."""
    opened = open_encoder(model)

    def work(number, after):
        killed_at(number, after)
        elip_models.embed(opened, pictures, tmp_path, **SMALL)

    for moment in ((1, False), (1, True), (1, False), (2, True), (1, True), (2, False)):
        assert in_child(partial(work, *moment)) == -signal.SIGKILL
    elip_models.embed(opened, pictures, tmp_path, **SMALL)
    assert files_of(tmp_path) == files_of(whole)
    assert {path.name for path in tmp_path.rglob(".*")} <= {".lock"}


def test_a_second_run_in_the_folder_is_refused(pictures, model, tmp_path):
    folder = output.OutputFolder(tmp_path)
    with folder.locked(), pytest.raises(ConfigError, match="output: expected a folder that no oth"):
        elip_models.embed(model, pictures, tmp_path, **SMALL)


def test_other_settings_are_refused_with_both_named(whole, pictures, model, tmp_path):
    before = files_of(whole)
    for options, message in (
        ({"reduce": "tome"}, "strategy.*None there, 'tome' now"),
        ({"embedding_dtype": "float16"}, "embedding_dtype: 'float32' there, 'float16' now"),
        ({"batch_size": 3}, "batch_size: 2 there, 3 now"),
        ({"preprocess": "clip"}, "preprocessing.kind: 'timm' there, 'given' now"),
    ):
        with pytest.raises(ConfigError, match=message):
            elip_models.embed(model, pictures, whole, **SMALL | options)
    (tmp_path / "a.png").write_bytes((pictures / "0.png").read_bytes())
    with pytest.raises(ConfigError, match=r"source.found: 9 there, 1 now; source.sha256"):
        elip_models.embed(model, tmp_path, whole, **SMALL)
    assert files_of(whole) == before


@pytest.mark.slow
def test_other_weights_are_refused(whole, pictures, model, tmp_path):
    weights = torch.load(model.partition("vit:")[2], weights_only=True)
    weights["cls_token"] += 1
    torch.save(weights, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match=r"model.name: .* there, .*other.pt' now; model.weights"):
        elip_models.embed(f"timm:test_vit:{tmp_path}/other.pt", pictures, whole, **SMALL)


def test_a_folder_with_other_files_is_refused(pictures, model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"output: expected a new or empty folder.*notes.txt"):
        elip_models.embed(model, pictures, tmp_path, **SMALL)
    with pytest.raises(ConfigError, match="output: expected a folder, got the file"):
        elip_models.embed(model, pictures, tmp_path / "notes.txt", **SMALL)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"output: expected a manifest.json of format 1"):
        elip_models.embed(model, pictures, tmp_path, **SMALL)


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


def test_a_full_disk_is_one_line_and_whole_shards_stay(
    whole, pictures, model, tmp_path, monkeypatch, capsys
):
    write, calls = output.write_file, []

    def full(path, content, **options):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content, **options)

    monkeypatch.setattr(output, "write_file", full)
    options = ["--batch-size", 2, "--shard-size", 3, "--workers", 0]
    arguments = ["embed", pictures, "--model", model, "--output", tmp_path / "out", *options]
    assert elip(*arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No space left on device; the files that were written" in said
    assert len(list((tmp_path / "out" / "images").glob("*.parquet"))) == 2
    assert elip(*arguments) == 0
    assert files_of(tmp_path / "out") == files_of(whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the process is forked")
def test_a_real_limit_of_the_file_system_is_one_line(pictures, model, tmp_path, capfd):
    def work():
        fill(tmp_path, 2_500)
        main(["embed", str(pictures), "--model", model, "--output", str(tmp_path), "--workers=0"])

    assert in_child(work) == 1  # `main` raises SystemExit
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and "File too large; the files that were written are whole" in said[0]
    assert not list((tmp_path / "images").glob("*"))


def test_a_folder_that_changes_during_the_run_is_reported(damaged, model, tmp_path):
    said = []

    def change(images, skipped):
        (damaged / "0.png").unlink(missing_ok=True)
        (damaged / "new.png").write_bytes(b"")

    options = SMALL | {"progress": change, "report": said.append}
    found = elip_models.embed(model, damaged, tmp_path / "out", **options)
    assert (found.found, found.skipped) == (13, 5)
    assert "changed during the run: 1 images were added" in said[-1] and "1 removed" in said[-1]


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


def test_a_cosine_that_is_too_low_stops_before_the_run(pictures, model, tmp_path, capsys):
    arguments = ["embed", pictures, "--model", model, "--output", tmp_path / "out"]
    options = ["--reduce", "random", "--keep", 0.3, "--min-cosine", 1.0, "--workers", 0]
    assert elip(*arguments, *options) == 2
    assert "error: --min-cosine: expected a mean cosine of at least 1" in capsys.readouterr().err
    assert not list((tmp_path / "out" / "images").glob("*"))


@pytest.mark.slow
def test_a_file_of_calibrate_is_read(pictures, model, tmp_path):
    from elip_models.models.io.files import write_json
    from elip_models.reduction.serialization import settings_of

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
    "reduce": ("tomme", "reduce: strategy: .*did you mean 'tome'"),
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
