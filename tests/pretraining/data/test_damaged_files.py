"""Damaged and hostile data files: intact samples are read, and lost ones are counted."""

import io
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from elip_models.images import MAX_PIXELS, SampleError, decode_image
from elip_models.pretraining.data import ShardSource, check_source
from elip_models.pretraining.data.tar_members import BLOCK, Damage, read_members
from tests.helpers.damage import SIX_GIGABYTES, header, headers, overwrite, picture, shard


def read(path):
    """Return the readable captions of a damaged shard, and the reasons for the others."""
    with pytest.warns(UserWarning, match=rf"{path.name} is damaged: "):
        source = ShardSource(path)
    report = check_source(source)
    assert report.seen == len(source)
    readable = [c for i in range(len(source)) for c in source.captions(i)]
    return readable, dict(report.reasons), len(source) - len(report.reasons)


@pytest.mark.parametrize("number", range(12))
def test_a_damaged_header_loses_its_member_and_is_counted(tmp_path, number):
    path = shard(tmp_path / "s.tar")
    overwrite(path, headers(path)[number] + 3, b"\xff")
    _, reasons, whole = read(path)
    assert whole == 5 and len(reasons) == 2  # the sample, and the bytes that are no member's
    at = headers(shard(tmp_path / "whole.tar"))[number]
    assert f"s.tar:byte {at}" in reasons


def test_a_truncated_shard_is_reported_wherever_it_is_cut(tmp_path):
    content = shard(tmp_path / "whole.tar").read_bytes()
    last = headers(tmp_path / "whole.tar")[-1] + BLOCK  # where the last text begins
    end = last + BLOCK
    for size in range(BLOCK, end + BLOCK, 200):
        path = tmp_path / f"{size}.tar"
        path.write_bytes(content[:size])
        _, reasons, whole = read(path)
        assert len(reasons) >= 1 and whole < 6 + (size >= last + len("caption of k5"))
    (tmp_path / "end.tar").write_bytes(content[: end + BLOCK])
    assert len(ShardSource(tmp_path / "end.tar")) == 6


NEGATIVE = b"\xff" * 11 + b"\x00"  # -256


@pytest.mark.parametrize(
    ("size", "kind"),
    [(NEGATIVE, b"0"), (SIX_GIGABYTES, b"0"), (SIX_GIGABYTES, b"x"), (NEGATIVE, b"L")],
)
def test_impossible_sizes_cost_neither_time_nor_memory(tmp_path, size, kind):
    path = shard(tmp_path / "s.tar")
    content, at = path.read_bytes(), headers(path)[4]
    path.write_bytes(content[:at] + header("k9.png", size, kind) + content[at:])
    _, reasons, whole = read(path)
    assert any("byte" in key for key in reasons)
    assert whole >= 2  # those before it


def test_a_sparse_member_is_named(tmp_path):
    path = shard(tmp_path / "s.tar")
    content = path.read_bytes()
    sparse = bytearray(header("k9.png", b"00000000000\0", b"S"))
    sparse[386:398], sparse[398:410] = b"00000000000\0", b"00000000000\0"
    sparse[483:495] = SIX_GIGABYTES
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse)
    path.write_bytes(bytes(sparse) + content)
    report = check_source(ShardSource(path))
    why = "k9.png is stored as a sparse file, which is not supported"
    assert (report.seen, report.reasons) == (7, [("s.tar:k9", why)])


def test_a_name_that_is_not_utf8_is_escaped(tmp_path):
    path = shard(tmp_path / "s.tar")
    content = path.read_bytes()
    renamed = bytearray(content)
    for at in headers(path)[:2]:
        renamed[at] = 0xFF
        renamed[at + 148 : at + 156] = b" " * 8
        renamed[at + 148 : at + 156] = b"%06o\0 " % sum(renamed[at : at + BLOCK])
    path.write_bytes(renamed)
    assert next(iter(ShardSource(path))).id == "s.tar:\\xff0"


def test_two_images_of_one_sample_are_both_reported(tmp_path):
    members = [("a.png", picture()), ("a.txt", b"one"), ("a.jpg", picture(1, "JPEG"))]
    with pytest.warns(UserWarning, match="a has 2 members of one kind"):
        source = ShardSource(shard(tmp_path / "s.tar", members))
    assert [each for each, _ in check_source(source).reasons] == ["s.tar:a"] * 2


def test_losses_of_equal_name_are_counted_one_by_one(tmp_path):
    twice = [("a.png", picture()), ("a.txt", b"one"), *[("a.jpg", picture())] * 600]
    with pytest.warns(UserWarning, match="is damaged"):
        source = ShardSource(shard(tmp_path / "s.tar", twice))
    assert check_source(source).summary().startswith("601 of 601 samples (100.0%)")
    (tmp_path / "o").mkdir()
    lost = [shard(tmp_path / each / "s.tar", [("a.txt", b"one")]) for each in (".", "o")]
    assert check_source(ShardSource(lost)).summary().startswith("2 of 2 samples (100.0%)")


def test_too_long_texts_are_not_read(tmp_path):
    members = [("a.png", picture()), ("a.txt", b"a" * (2**20 + 1)), ("b.png", picture())]
    source = ShardSource(shard(tmp_path / "s.tar", [*members, ("b.json", b"[" * 100_000)]))
    reasons = dict(check_source(source).reasons)
    assert reasons.keys() == {"s.tar:a", "s.tar:b"}
    too_long = "captions not readable: expected at most 1048576 bytes, got 1048577"
    assert reasons["s.tar:a"] == too_long


def test_archives_appended_to_each_other_are_all_read(tmp_path):
    content = shard(tmp_path / "s.tar").read_bytes()
    other = shard(tmp_path / "o.tar", [("z.png", picture()), ("z.txt", b"last")]).read_bytes()
    (tmp_path / "s.tar").write_bytes(content + other)
    assert [sample.captions for sample in ShardSource(tmp_path / "s.tar")][-1] == ("last",)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_equal_those_of_tarfile(tmp_path, format):
    name = "d" * 60 + "/" + "n" * 90
    path = shard(tmp_path / "s.tar", [(f"{name}.txt", b"a"), ("b.txt", b"bc")], format)
    found = list(read_members(path))
    with tarfile.open(path) as tar:
        expected = [(each.name, each.offset_data, each.size, "") for each in tar]
    assert found == expected and not any(isinstance(each, Damage) for each in found)


def chunk(kind, content):
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def png(width, height, colour=2):
    """Return the header of a PNG image of any size, without pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png(13_000, 13_000), f"at most {MAX_PIXELS} pixels.*got 13000 x 13000"),
        (png(2_000_000, 1), "at most 64:1, got 2000000 x 1"),
        (png(8, 8, colour=3), "not a readable image"),  # a palette that is not there
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify its format$"),
        (b"\x00\x00\x00\x1cftypavif" + bytes(64), "not a readable image"),
        (b"DDS |\x00\x00\x00" + bytes(120), "not a readable image"),
        (b"BLP2" + bytes(200), "not a readable image"),
        (b"", "not a readable image"),
    ],
)
def test_an_unsupported_image_is_a_sample_error(content, reason):
    with pytest.raises(SampleError, match=reason):
        decode_image(io.BytesIO(content), "id")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_damaged_image_is_read_or_a_sample_error(format):
    content, random = picture(3, format), np.random.default_rng(0)
    assert decode_image(io.BytesIO(content), "id").size == (12, 10)
    for _ in range(40):
        damaged = bytearray(content)
        for at in random.integers(0, len(content), 3):
            damaged[at] = random.integers(256)
        try:
            assert decode_image(io.BytesIO(bytes(damaged)), "id").mode == "RGB"
        except SampleError as error:
            assert error.reason.startswith("not a readable image: ")


def many_scans(count, size=(64, 64)):
    """Return a progressive JPEG whose last scan is repeated."""
    file = io.BytesIO()
    Image.new("RGB", size, (90, 90, 90)).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    return content[:-2] + content[content.rindex(b"\xff\xda") : -2] * count + content[-2:]


@pytest.mark.parametrize(
    ("count", "size", "reason"),
    [
        (6000, (64, 64), "at most 100 scans.*got 6010 of 64 x 64"),
        (40, (8000, 4000), "of 1024000000 pixels in all, got 50 of 8000 x 4000"),
    ],
)
def test_a_jpeg_of_many_scans_is_not_decoded(count, size, reason, monkeypatch):
    content = many_scans(count, size)
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    with pytest.raises(SampleError, match=reason):
        decode_image(io.BytesIO(content), "id")


def test_scans_in_other_parts_of_a_jpeg_are_not_counted():
    content = many_scans(80)
    comment = b"\xff\xfe" + (2002).to_bytes(2) + b"\xff\xda" * 1000
    content = content[:2] + comment + content[2:] + b"\xff\xda" * 1000
    assert decode_image(io.BytesIO(content), "id").size == (64, 64)


def test_a_huge_image_file_is_not_read(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(SampleError, match="expected at most 268435456 bytes, got 1099511627776"):
        decode_image(tmp_path / "a.png", "id")
