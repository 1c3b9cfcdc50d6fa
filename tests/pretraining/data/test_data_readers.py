"""Readers of JSON lists and tar shards: specifications, samples, and unreadable samples."""

import json
import os
import pickle
from pathlib import Path

import pytest

from elip_models.images import SampleError
from elip_models.pretraining.data import JsonSource, ShardSource, Source, check_source, open_source
from tests.helpers.damage import picture, shard
from tests.helpers.scene_files import TEST_SCENES
from tests.helpers.task_files import draw, write


def write_shard(path: Path, keys: list[str]) -> Path:
    members = [
        ((f"{key}.png", picture()), (f"{key}.txt", f"caption {key}".encode())) for key in keys
    ]
    return shard(path, [member for pair in members for member in pair])


def write_list(folder: Path, entries: list) -> Path:
    draw(folder / "a.png")
    return write(folder / "list.json", entries)


def opened(spec: object) -> Source:
    return open_source(str(spec), image_size=16)


def test_a_list_and_a_shard_hold_the_same_samples(scene_files):
    listed, sharded = opened(scene_files / "test.json"), opened(scene_files / "test-0000.tar")
    assert len(listed) == len(sharded) == TEST_SCENES
    by_key = {sample.id.split(":")[1]: sample for sample in sharded}
    for sample in listed:
        other = by_key[sample.id]
        assert sample.captions == other.captions
        assert sample.image.mode == "RGB" and sample.image.tobytes() == other.image.tobytes()


def test_ranges_globs_folders_and_lists_name_the_same_shards(tmp_path):
    for number in range(8, 12):
        write_shard(tmp_path / f"s-{number:02d}.tar", [f"k{number}"])
    ids = [f"s-{number:02d}.tar:k{number}" for number in range(8, 12)]
    specs = {
        "s-{08..11}.tar": ids,
        "s-*.tar": ids,
        "s-1[01].tar": ids[2:],
        "s-11.tar, s-08.tar": [ids[3], ids[0]],
        "s-{08..09}.tar,s-1*.tar": ids,
        "": ids,
    }
    for spec, expected in specs.items():
        parts = ",".join(str(tmp_path / part.strip()) for part in spec.split(","))
        assert [sample.id for sample in opened(parts)] == expected
    with pytest.raises(FileNotFoundError, match=r"s-00\.tar"):
        opened(tmp_path / "s-{0..1}{0..1}.tar")
    write_shard(tmp_path / "s-1[01].tar", ["k"])  # a file whose name looks like a pattern
    assert [sample.id for sample in opened(tmp_path / "s-1[01].tar")] == ["s-1[01].tar:k"]


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (3, TypeError, "spec: expected a text or a mapping, got 3"),
        (" , ", ValueError, "spec: expected .*emoji_scenes.*, got ' , '"),
        ("no-*.tar", FileNotFoundError, r"spec: expected an existing file, got 'no-\*\.tar'"),
        ("no-{3..2}.tar", ValueError, "spec: expected rising ranges .*, got 0 names in"),
        ("empty", FileNotFoundError, r"expected a folder with \*\.tar, got 'empty'"),
        ("a.txt", ValueError, r"spec: expected files that are all \.json, or all \.tar.*txt"),
        ("list.json", ValueError, r"spec: expected at least one sample, got none in 'list\.json'"),
        ("a.tar,list.json", ValueError, r"spec: expected .*, got \['\.json', '\.tar'\]"),
        ("a.tar,split=test", ValueError, r"all \.tar and then no options, got \['\.tar'\]"),
        ("emoji_scenes", ValueError, "spec: expected a size, got 'emoji_scenes'; write emoji_sc"),
        ("emoji_scenes:size=1,sed=2", ValueError, "size, seed, clutter, textures, got 'sed'"),
    ],
)
def test_bad_specs(spec, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").touch()
    write_shard(tmp_path / "a.tar", ["k"])
    write_list(tmp_path, [])
    with pytest.raises(error, match=message):
        open_source(spec, image_size=16)


def test_captions_are_a_text_or_a_list_and_empty_ones_are_dropped(tmp_path):
    entries = [
        {"image": "a.png", "caption": " one\n text é"},
        {"image": "a.png", "caption": ["two", "", "  ", "three"], "image_id": 17},
    ]
    write_list(tmp_path / "images", [])
    path = write_list(tmp_path, entries)
    path.write_text(path.read_text(), encoding="utf-8-sig")  # may begin with a byte order mark
    source = JsonSource(path, image_root=tmp_path / "images")
    first, second = source
    assert (first.captions, first.id, first.image.size) == (("one text é",), "a.png", (6, 5))
    assert (second.captions, second.id) == (("two", "three"), "17")
    assert source.captions(1) == ("two", "three") and source.image_number(1) == 0


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"image": "missing.png", "caption": "a"}, "no such file: .*missing.png"),
        ({"image": "cut.png", "caption": "a"}, "not a readable image: .*truncated"),
        ({"image": "a" * 256 + ".png", "caption": "a"}, "no such file"),
        ({"image": "pipe.png", "caption": "a"}, "not a file"),
        ({"image": "a.png", "caption": ["  "]}, "no caption"),
    ],
)
def test_an_unreadable_entry_is_that_samples_error(entry, reason, tmp_path):
    (tmp_path / "cut.png").write_bytes(picture()[:200])
    os.mkfifo(tmp_path / "pipe.png")
    source = JsonSource(write_list(tmp_path, [{"image": "a.png", "caption": "a"}, entry]))
    assert source[0].captions == ("a",)
    with pytest.raises(SampleError, match=reason) as caught:
        source[1]
    assert caught.value.id == f"list.json[1] {entry['image']}"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    report = check_source(source)
    assert (report.seen, len(report.reasons)) == (2, 1)


HALF = "half \ud83d"
BOXES = {"image": "a", "caption": "a", "boxes": [[[0, float("nan"), 1, 1]]]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"list\.json: expected a list of .*, got no valid JSON"),
        ('{"image": "a.png"}', r"list\.json\[image\]: expected the key caption, got"),
        ('[{"caption": "a"}]', r"list\.json\[0\]: expected 1 image paths, got \{'caption"),
        ('[{"image": 3, "caption": "a"}]', r"\[0\]\[image\]\[0\]: .* valid string, got 3"),
        ('[{"image": "a", "caption": [3]}]', r"\[0\]\[caption\]\[0\]: .* valid string, got 3"),
        ('[{"image": "a", "caption": "a", "caption": "b"}]', "an object has a key twice, of"),
        (json.dumps([{"image": "a", "caption": HALF}]), r"\[0\]\[caption\]\[0\]: .*surrogates"),
        (json.dumps([BOXES]), r"\[0\]\[boxes\]\[0\]\[0\]\[1\]: .* finite number, got nan"),
        (
            json.dumps([BOXES | {"boxes": [[], []]}]),
            r"\[0\]\[boxes\]: .* each of 1 captions, got 2",
        ),
        ('{"images": [{"filename": "a", "sentences": [{}]}]}', r"\[images\]\[0\]\[sentences\]"),
        (
            '{"images": [], "annotations": [{"image_id": 3}]}',
            r"\[annotations\]\[0\]: expected the key caption, got",
        ),
    ],
)
def test_a_file_of_another_form_is_one_line_that_names_the_place(content, message, tmp_path):
    path = tmp_path / "list.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        JsonSource(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 + len(str(path))


def test_captions_of_json_and_txt_are_united_and_members_grouped_by_key(tmp_path):
    members = {
        "d/1.json": b'{"captions": ["one", "two"], "caption": "unused"}',
        "d/1.PNG": picture(),
        "d/2.jpg": picture(format="JPEG"),
        "d/1.txt": b"two",
        "d/2.txt": "\ufeff three\n".encode(),  # may begin with a byte order mark
        "d/3.webp": picture(format="WEBP"),
        "d/3.json": b'{"captions": null, "caption": "four"}',
        "d/3.cls": b"7",
        "README": b"ignored",
    }
    samples = list(ShardSource(shard(tmp_path / "s.tar", members.items())))
    assert [sample.id for sample in samples] == ["s.tar:d/1", "s.tar:d/2", "s.tar:d/3"]
    assert [sample.captions for sample in samples] == [("one", "two"), ("three",), ("four",)]
    assert all(sample.image.size == (12, 10) for sample in samples)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"k.png": b"not an image", "k.txt": b"a"}, "not a readable image"),
        ({"k.txt": b"a"}, "no image member"),
        ({"k.png": picture()}, "no caption"),
        ({"k.png": picture(), "k.json": b"{}"}, "no caption"),
        ({"k.png": picture(), "k.json": b"[]"}, "json: expected an object"),
        ({"k.png": picture(), "k.json": b'{"caption": 3}'}, "caption: expected a text or"),
        ({"k.png": picture(), "k.txt": b"\xff"}, "captions not readable"),
        ({"k.png": picture(), "k.jpg": picture(), "k.txt": b"a"}, "several images or captions"),
    ],
)
def test_an_unreadable_member_is_that_samples_error(members, reason, tmp_path):
    good = {"good.png": picture(), "good.txt": b"fine"}
    source = ShardSource(shard(tmp_path / "s.tar", (members | good).items()))
    assert source[1].captions == ("fine",)
    with pytest.raises(SampleError, match=reason) as caught:
        source[0]
    assert caught.value.id == "s.tar:k"


@pytest.mark.parametrize("members", [[], [("a.parquet", b"rows")]])
def test_a_shard_without_a_sample_is_named(members, tmp_path):
    shard(tmp_path / "a.tar", members)
    write_shard(tmp_path / "b.tar", ["k"])
    with pytest.raises(ValueError, match=r"a\.tar: expected members that end in jpeg, jpg, png"):
        open_source(str(tmp_path), image_size=16)
