"""Every form of source lists the same images, locally and through fsspec."""

import hashlib
import json
import socket
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import fsspec
import pyarrow
import pytest
from pyarrow import parquet

from elip_models.embedding.source import open_images, read_payload, without_secrets
from elip_models.images import SampleError
from elip_models.validation import ConfigError
from tests.helpers.damage import picture, shard

NAMES = ("0.png", "1.png", "sub/a.jpg")


def digests(source):
    """SHA-256 of each readable image by its key."""
    payloads = source.payloads(0, len(source))
    return {
        key: hashlib.sha256(read_payload(payload)).hexdigest()
        for key, payload in zip(source.keys, payloads, strict=True)
    }


def as_folder(pictures, target):
    for name in NAMES:
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes((pictures / name).read_bytes())
    return target


def as_tar(pictures, target):
    path = target / "images-0000.tar"
    with tarfile.open(path, "w") as tar:
        for name in NAMES:
            tar.add(pictures / name, name)
    return path


def rows(pictures):
    return [{"path": name, "label": str(i)} for i, name in enumerate(NAMES)]


def as_list(ending, write):
    def make(pictures, target):
        path = as_folder(pictures, target) / f"list{ending}"
        write(rows(pictures), path)
        return path

    return make


def as_table(pictures):
    contents = [(pictures / name).read_bytes() for name in NAMES]
    return pyarrow.table({"label": ["0", "1", "2"], "image": contents})


def as_parquet(pictures, target):
    parquet.write_table(as_table(pictures), target / "images.parquet", row_group_size=2)
    return target / "images.parquet"


def as_dataset(pictures, target):
    contents = [{"bytes": (pictures / name).read_bytes(), "path": None} for name in NAMES]
    made = datasets.Dataset.from_dict({"image": contents, "label": ["0", "1", "2"]})
    made.cast_column("image", datasets.Image()).save_to_disk(target / "dataset")
    return target / "dataset"


def csv_text(lines):
    return "\n".join(["path,label", *(f"{line['path']},{line['label']}" for line in lines)])


FORMS = {
    "folder": as_folder,
    "tar": as_tar,
    "json": as_list(".json", lambda lines, path: path.write_text(json.dumps(lines))),
    "jsonl": as_list(
        ".jsonl", lambda lines, path: path.write_text("\n".join(map(json.dumps, lines)))
    ),
    "csv": as_list(".csv", lambda lines, path: path.write_text(csv_text(lines))),
    "paths": as_list(
        ".json", lambda lines, path: path.write_text(json.dumps([line["path"] for line in lines]))
    ),
    "parquet of paths": as_list(
        ".parquet",
        lambda lines, path: parquet.write_table(pyarrow.Table.from_pylist(lines), path),
    ),
    "parquet": as_parquet,
    "datasets": as_dataset,
}
KEYS = {
    "tar": ["images-0000.tar:0", "images-0000.tar:1", "images-0000.tar:sub/a"],
    "parquet": ["0", "1", "2"],
    "datasets": ["0", "1", "2"],
}
WITH_COLUMNS = ("json", "jsonl", "csv", "parquet of paths", "parquet", "datasets")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_lists_the_same_images(form, pictures, tmp_path):
    source = open_images(FORMS[form](pictures, tmp_path))
    assert [*source.keys] == KEYS.get(form, [*NAMES])
    wanted = [hashlib.sha256((pictures / name).read_bytes()).hexdigest() for name in NAMES]
    assert [*digests(source).values()] == wanted
    assert read_payload(next(source.payloads(2, 3))) == (pictures / NAMES[2]).read_bytes()
    assert [row for row, _ in source.sample(5)] == [0, 1, 2]
    if form in WITH_COLUMNS:
        kept = open_images(FORMS[form](pictures, tmp_path), keep_columns=["label"])
        assert [*map(str, kept.columns["label"].to_pylist())] == ["0", "1", "2"]  # csv: integers
        assert len(kept.columns) == 3


@pytest.mark.parametrize("form", ["folder", "tar", "csv", "parquet", "datasets"])
def test_a_url_of_fsspec_is_a_source(form, pictures, tmp_path):
    path, memory = FORMS[form](pictures, tmp_path), fsspec.filesystem("memory")
    memory.put(str(tmp_path), f"/{form}", recursive=True)
    source = open_images(f"memory:/{path}".replace(str(tmp_path), f"/{form}"))
    assert digests(source) == digests(open_images(path))
    memory.rm(f"/{form}", recursive=True)


def test_a_list_and_a_tar_on_a_web_server_are_sources_without_secrets(pictures, tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec reads https:// by aiohttp")
    as_tar(pictures, tmp_path)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.func.log_message = lambda *arguments: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"
    as_folder(pictures, tmp_path)
    url = f"http://{address}/0.png?token=1&of=https://example.org/0.png"
    (tmp_path / "list.json").write_text(json.dumps([url, "no.png"]))
    listed = open_images(f"http://{address}/list.json")
    assert listed.keys == [f"http://{address}/0.png", "no.png"]
    first, second = listed.payloads(0, 2)
    assert read_payload(first) == (pictures / "0.png").read_bytes()
    with pytest.raises(SampleError, match="cannot be read"):
        read_payload(second)
    tar = open_images(f"http://{address}/images-0000.tar?token=1")
    assert tar.location.endswith(".tar") and tar.keys[0] == "images-0000.tar:0"
    (tmp_path / "gone.json").write_text(json.dumps([f"http://{address}/gone.png?token=1"]))
    for name in ("gone.json", "missing.tar?token=1", "list.json?token=1"):
        with pytest.raises((ConfigError, SampleError), match=r"gone|missing|no\.png") as error:
            *_, last = open_images(f"http://{address}/{name}").payloads(0, 2)
            read_payload(last)
        assert "token" not in str(error.value)
    server.shutdown()
    server.server_close()


def test_several_files_are_one_source_by_range_pattern_and_folder(tmp_path):
    for number in range(2):
        shard(tmp_path / f"a-{number:02d}.tar")
    whole = open_images(tmp_path)
    assert len(whole) == 12 and whole.keys[6] == "a-01.tar:k0"
    for pattern in ("a-{00..01}.tar", "a-*.tar"):
        assert open_images(f"{tmp_path}/{pattern}").keys == whole.keys


@pytest.mark.parametrize("at", ["header", "content"])
def test_the_damaged_part_of_a_tar_is_named(at, tmp_path):
    path = shard(tmp_path / "0.tar", [(f"{i}.png", picture(i)) for i in range(3)])
    with tarfile.open(path) as tar:
        member = tar.getmembers()[1]
    content = bytearray(path.read_bytes())
    if at == "header":
        content[member.offset : member.offset + 90] = b"x" * 90
        path.write_bytes(content)
    else:
        path.write_bytes(content[: member.offset_data + 5])
    source = open_images(path)
    reasons = []
    for payload in source.payloads(0, len(source)):
        try:
            read_payload(payload)
        except SampleError as error:
            reasons.append(error.reason)
    assert "the tar file is damaged from byte" in reasons[-1]
    assert len(source) == {"header": 2, "content": 3}[at]


def test_a_key_column_names_the_images_and_007_is_not_7(pictures, tmp_path):
    path = as_folder(pictures, tmp_path) / "list.csv"
    path.write_text("key,path,label\n007,0.png,1\n7,1.png,2\n")
    source = open_images(path, keep_columns=["label"])
    assert source.keys == ["007", "7"] and source.columns["label"].to_pylist() == [1, 2]
    assert open_images(path, key_column="label").keys == ["1", "2"]


@pytest.mark.parametrize("form", ["folder", "json", "jsonl", "csv", "paths", "parquet of paths"])
def test_another_size_of_an_image_changes_the_checksum(form, pictures, tmp_path):
    path = FORMS[form](pictures, tmp_path)
    before = open_images(path).described()
    assert before == open_images(path).described()
    (tmp_path / "0.png").write_bytes(b"other")
    assert before["sha256"] != open_images(path).described()["sha256"]


def listed(ending, lines, folder):
    """Write a list of images and return its description, with the captions kept."""
    path = folder / f"list{ending}"
    if ending == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(lines), path)
    else:
        path.write_text(json.dumps(lines))
    return open_images(path, keep_columns=["caption"]).described()


@pytest.mark.parametrize("form", ["csv", "folder", "tar", "datasets"])
def test_a_wrong_column_is_an_error(form, pictures, tmp_path):
    source = FORMS[form](pictures, tmp_path)
    for option in ({"keep_columns": ["labell"]}, {"key_column": "labell"}):
        with pytest.raises(ConfigError, match=r"source: expected a folder .*labell") as caught:
            open_images(source, **option)
        assert "\n" not in str(caught.value)


FILES = {
    "broken.parquet": (b"PAR1", "expected a folder of images"),
    "broken.json": (b"{", "expected a folder of images"),
    "numbers.json": (b"[1]", "expected a folder of images"),
    "empty.jsonl": (b"", "expected a list of paths"),
    "twice.csv": (b"image,image\na,b\n", "expected a folder of images"),
    "notes.txt": (b"text", "no such folder; the working folder is"),
    "equal.json": (b'["a.png", "a.png"]', "different key for each image, got 'a.png' 2 times"),
    "output.json": (b'[{"path": "a", "sha256": "b"}]', "keep_columns: expected other names"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_file_is_one_line(name, tmp_path):
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content)
    kept = ["sha256"] if name == "output.json" else []
    with pytest.raises(ConfigError, match=message) as caught:
        open_images(tmp_path / name, keep_columns=kept)
    assert "\n" not in str(caught.value)


def test_a_source_without_images_or_of_two_kinds_is_an_error(pictures, tmp_path):
    for source, message in (
        (tmp_path / "missing", "no such folder"),
        (tmp_path, "at least one image, got none"),
        (f"{tmp_path}/*.tar", "expected files with one ending, got 0"),
        ("nothing://a", "nothing"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_images(source)
    shard(as_folder(pictures, tmp_path) / "0.tar")
    with pytest.raises(ConfigError, match=r"one kind, got tar files and images; .*/\*.tar"):
        open_images(tmp_path)


def test_two_columns_of_images_without_a_known_name_are_an_error(tmp_path):
    parquet.write_table(pyarrow.table({"left": [b"l"], "right": [b"r"]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"one column of images, .* left, right; .*--image-col"):
        open_images(tmp_path / "a.parquet")
    source = open_images(tmp_path / "a.parquet", image_column="right")
    assert read_payload(next(source.payloads(0, 1))) == b"r"


def test_a_damaged_parquet_file_is_one_line(pictures, tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(as_table(pictures).select(["image"]), path)
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(60) + content[64:])
    with pytest.raises(ConfigError, match=r"source: expected whole Parquet files, got .*a.parq"):
        digests(open_images(path))


def test_the_splits_of_a_dataset_are_named(pictures, tmp_path):
    split = datasets.load_from_disk(str(as_dataset(pictures, tmp_path)))
    datasets.DatasetDict({"train": split}).save_to_disk(tmp_path / "all")
    with pytest.raises(ConfigError, match=r"expected one split, .*/all/train"):
        open_images(Path(tmp_path / "all"))


def test_a_server_that_sends_nothing_is_left_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr("elip_models.pretraining.data.remote_files.SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://user:SECRET@127.0.0.1:{silent.getsockname()[1]}/a"
        (tmp_path / "list.csv").write_text(f"image\n{url}.png?token=HUSH")
        source = open_images(tmp_path / "list.csv")
        assert not any(word in source.keys[0] for word in ("SECRET", "HUSH"))
        with pytest.raises(SampleError, match="cannot be read: the server did not answer in time"):
            digests(source)
        for ending in (".tar", ".csv", ""):
            with pytest.raises(ConfigError, match=r"source: .*/a.*: the server did not answer"):
                open_images(f"{url}{ending}?token=HUSH")


SHOWN = {
    "a?b@c": "a?b@c",
    "https://user:SECRET@host/a.png?token=HUSH": "https://host/a.png",
    "zip://*.png::https://user:SECRET@host/a.zip?token=HUSH": "zip://*.png::https://host/a.zip",
}


@pytest.mark.parametrize("location", SHOWN)
def test_a_location_is_shown_without_its_secrets(location):
    assert without_secrets(location) == SHOWN[location]


SCHEMES = (
    "dir://x",
    "data:,x",
    "reference://x",
    "zip://a::b",
    "zip://a::no.zip",
    "memory://x",
    "foo://x",
)


@pytest.mark.parametrize("location", SCHEMES)
def test_a_location_of_any_library_is_one_line(location, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no.zip").write_bytes(b"not an archive")
    with pytest.raises(ConfigError, match=f"^source: expected .*got {location.partition(':')[0]}"):
        open_images(location)
