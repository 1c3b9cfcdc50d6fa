"""Every form of source lists the same images, locally and through fsspec."""

import csv
import hashlib
import json
import tarfile

import datasets
import fsspec
import pyarrow
import pytest
from pyarrow import parquet

from elip_models.embedding import image_tables
from elip_models.embedding.image_source import SourceOptions, different_keys
from elip_models.embedding.open_images import open_images
from elip_models.embedding.stored import read
from elip_models.images import SampleError
from elip_models.validation import ConfigError
from tests.helpers.damage import headers, picture, shard


def opened(source, **options):
    return open_images(source, SourceOptions(**options))


def digests(source):
    """SHA-256 of each readable image by its key."""
    payloads = source.payloads(0, len(source))
    return {
        key: hashlib.sha256(read(payload)).hexdigest()
        for key, payload in zip(source.keys, payloads, strict=True)
    }


def names(folder):
    return ["0.png", "1.png", "sub/a.jpg"]


def as_folder(pictures, target):
    for name in names(pictures):
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes((pictures / name).read_bytes())
    return target


def as_tar(pictures, target):
    path = target / "images-0000.tar"
    with tarfile.open(path, "w") as tar:
        for name in names(pictures):
            tar.add(pictures / name, name)
    return path


def in_list(write, ending):
    def make(pictures, target):
        as_folder(pictures, target)
        path = target / f"list{ending}"
        write(path, [{"path": name, "label": i} for i, name in enumerate(names(pictures))])
        return path

    return make


def write_json(path, rows):
    path.write_text(json.dumps([row["path"] for row in rows]))


def write_lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def as_parquet(pictures, target):
    content = [(pictures / name).read_bytes() for name in names(pictures)]
    table = {"key": names(pictures), "image": content, "label": range(len(content))}
    parquet.write_table(pyarrow.table(table), target / "images.parquet", row_group_size=2)
    return target / "images.parquet"


def as_dataset(pictures, target):
    paths = [str(pictures / name) for name in names(pictures)]
    rows = {"key": names(pictures), "picture": paths, "label": [0, 1, 2]}
    found = datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())
    found.save_to_disk(target / "dataset")
    return target / "dataset"


FORMS = {
    "folder": as_folder,
    "tar": as_tar,
    "json": in_list(write_json, ".json"),
    "json lines": in_list(write_lines, ".jsonl"),
    "csv": in_list(write_csv, ".csv"),
    "parquet of paths": in_list(write_parquet, ".parquet"),
    "parquet": as_parquet,
    "datasets": as_dataset,
}


@pytest.fixture
def expected(pictures):
    contents = [(name, (pictures / name).read_bytes()) for name in names(pictures)]
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_lists_the_same_images(form, pictures, expected, tmp_path):
    source = opened(FORMS[form](pictures, tmp_path))
    found = digests(source)
    if form == "tar":
        keys = ("0", "1", "sub/a")
        expected = {
            f"images-0000.tar:{key}": digest
            for key, digest in zip(keys, expected.values(), strict=True)
        }
    assert found == expected
    assert [row for row, _ in source.sample(2)] == [0, 1]
    rows = [list(source.payloads(i, i + 1)) for i in range(3)]
    assert [hashlib.sha256(read(each)).hexdigest() for (each,) in rows] == list(found.values())


@pytest.fixture
def memory():
    """Return a function that copies a path into fsspec's file system in memory."""
    files = fsspec.filesystem("memory")

    def copy(path):
        files.put(str(path), f"/copies/{path.name}", recursive=True)
        return f"memory://copies/{path.name}"

    yield copy
    files.rm("/copies", recursive=True)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "datasets"])
def test_every_form_is_read_through_fsspec(form, pictures, tmp_path, memory):
    local = FORMS[form](pictures, tmp_path)
    if local.suffix in (".json", ".jsonl", ".csv") or form == "parquet of paths":
        url = f"{memory(tmp_path)}/{local.name}"
    else:
        url = memory(local)
    source = opened(url)
    assert list(digests(source).values()) == list(digests(opened(local)).values())
    assert source.kind == opened(local).kind


def test_a_list_may_have_urls_of_other_file_systems(pictures, tmp_path, memory):
    url = memory(pictures / "0.png")
    (tmp_path / "list.json").write_text(json.dumps([url, str(pictures / "1.png")]))
    assert list(digests(opened(tmp_path / "list.json"))) == [url, str(pictures / "1.png")]


def test_several_tars_are_one_source_by_range_pattern_and_folder(tmp_path):
    for number in range(2):
        shard(tmp_path / f"a-{number:02d}.tar")
    whole = opened(tmp_path)
    assert len(whole) == 12 and whole.keys[6] == "a-01.tar:k0"
    for pattern in ("a-{00..01}.tar", "a-*.tar"):
        assert opened(f"{tmp_path}/{pattern}").keys == whole.keys


def test_a_tar_needs_no_captions_and_a_damaged_one_is_named(tmp_path):
    path = shard(tmp_path / "0.tar", [(f"{i}.png", picture(i)) for i in range(3)])
    assert len(digests(opened(path))) == 3
    path.write_bytes(path.read_bytes()[: headers(path)[2] + 600])
    with pytest.raises(ConfigError, match=r"source: .*0\.tar: expected a complete, uncompressed"):
        opened(path)


KEPT = ("json lines", "csv", "parquet of paths", "parquet", "datasets")


@pytest.mark.parametrize("form", KEPT)
def test_columns_are_kept(form, pictures, tmp_path):
    source = opened(FORMS[form](pictures, tmp_path), keep_columns=("label",))
    assert source.kept([2, 0])["label"].to_pylist() == [2, 0]


def test_a_key_column_names_the_images(pictures, tmp_path):
    path = FORMS["csv"](pictures, tmp_path)
    assert opened(path, key_column="label").keys == ["0", "1", "2"]
    path.write_text("key,path,label\n007,0.png,1\n7,1.png,2\n")
    source = opened(path, keep_columns=("label",))
    assert source.keys == ["007", "7"] and source.kept([1])["label"].to_pylist() == [2]


WRONG = {
    "unknown column": ("csv", {"keep_columns": ("labell",)}, "keep_columns.*did you mean 'label'"),
    "no columns": ("folder", {"keep_columns": ("label",)}, "keep_columns: expected no columns"),
    "unknown key": ("parquet", {"key_column": "id"}, "key_column: expected columns among"),
    "unknown image": ("json", {"image_column": "url"}, "image_column: expected columns among"),
    "own column": ("parquet", {"keep_columns": ("key",)}, "keep_columns: expected other names"),
    "no paths": ("csv", {"image_column": "label"}, "image_column: expected paths in 'label'"),
    "tar": ("tar", {"key_column": "id"}, "key_column: expected none for tar files"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_column_is_an_error(case, pictures, tmp_path):
    form, options, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        opened(FORMS[form](pictures, tmp_path), **options)


def test_equal_keys_are_an_error_or_get_a_suffix(pictures, tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"path": str(pictures / "0.png"), "key": "a"}] * 2))
    with pytest.raises(ConfigError, match=r"different key for each image, got 'a' 2 times"):
        opened(path)
    assert opened(path, on_duplicate="suffix").keys == ["a", "a#2"]
    assert different_keys(["a", "a#2", "a", "a"], "suffix") == ["a", "a#2", "a#3", "a#4"]


def test_a_source_without_images_is_an_error(pictures, tmp_path):
    for source, message in (
        (tmp_path / "missing", "no such folder"),
        (tmp_path, "at least one image, got none"),
        (pictures / "notes.txt", "no such folder"),
        (f"{tmp_path}/*.tar", "no file matches"),
        ("nothing://a", "nothing"),
        (7, "expected a folder of images"),
    ):
        with pytest.raises(ConfigError, match=message):
            opened(source)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text("[1]")
    for name in ("broken.parquet", "broken.json", "other.json"):
        with pytest.raises(ConfigError, match="source: expected a folder of images"):
            opened(tmp_path / name)


def test_a_folder_of_several_kinds_is_an_error(pictures, tmp_path):
    as_folder(pictures, tmp_path)
    shard(tmp_path / "0.tar")
    with pytest.raises(
        ConfigError, match=r"one kind, got .tar files and images in .*/\*.tar', or move"
    ):
        opened(tmp_path)


def test_the_splits_of_a_dataset_are_named(pictures, tmp_path):
    as_dataset(pictures, tmp_path)
    split = datasets.load_from_disk(str(tmp_path / "dataset"))
    datasets.DatasetDict({"train": split}).save_to_disk(tmp_path / "all")
    with pytest.raises(ConfigError, match=r"expected one split, .*/all/train"):
        opened(tmp_path / "all")


def test_a_missing_path_or_cell_is_a_reason(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps([{"path": None, "key": "a"}]))
    (payload,) = opened(tmp_path / "list.json").payloads(0, 1)
    with pytest.raises(SampleError, match="no path in the list"):
        read(payload)
    table = pyarrow.table({"image": pyarrow.array([None, b"x"], pyarrow.binary())})
    parquet.write_table(table, tmp_path / "a.parquet")
    first, second = opened(tmp_path / "a.parquet").payloads(0, 2)
    with pytest.raises(SampleError, match="no image in the row"):
        read(first)
    assert read(second) == b"x"


def test_a_change_of_names_or_sizes_changes_the_checksum(pictures, tmp_path):
    folder = as_folder(pictures, tmp_path)
    before = opened(folder).sha256()
    assert before == opened(folder).sha256()
    (folder / "0.png").write_bytes(b"other")
    assert before != opened(folder).sha256()
    (tmp_path / "table").mkdir()
    path = as_parquet(pictures, tmp_path / "table")
    before = opened(path).sha256()
    table = parquet.read_table(path)
    parquet.write_table(table.set_column(1, "image", [table["image"].take([0, 0, 0])]), path)
    assert before != opened(path).sha256()


def test_a_parquet_file_without_the_column_or_with_damage_is_one_sentence(pictures, tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"image": [(pictures / "0.png").read_bytes()]}), path)
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(60) + content[64:])
    with pytest.raises(ConfigError, match=r"source: expected whole Parquet files, got '.*a.parq"):
        digests(opened(path))
    parquet.write_table(pyarrow.table({"other": [b"x"], "key": ["a"]}), tmp_path / "z.parquet")
    with pytest.raises(ConfigError, match=r"z.parquet: expected a column 'image', got other, key"):
        opened(f"{tmp_path}/*.parquet")


def test_rows_of_a_parquet_file_are_read_from_their_row_group(pictures, tmp_path, monkeypatch):
    source = opened(as_parquet(pictures, tmp_path))
    monkeypatch.setattr(image_tables, "ROWS", 1)
    assert [read(each) for each in source.payloads(1, 3)] == [
        (pictures / name).read_bytes() for name in names(pictures)[1:]
    ]
