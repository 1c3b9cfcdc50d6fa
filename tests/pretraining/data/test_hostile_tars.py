"""Hostile tars: nothing hangs, no pair is wrong, and each loss is reported."""

import io
import json
import subprocess
import sys
import tarfile
import warnings

import pytest

from elip_models.images import SampleError
from elip_models.pretraining.data import ShardSource, check_source, tar_members
from elip_models.pretraining.data.tar_members import BLOCK, Damage, Member, read_members
from tests.helpers.damage import header, headers, overwrite, pax, picture, shard, with_checksum

EMPTY = b"%011o\0" % 0


def check(path):
    """The captions that are read, and the report of the others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = ShardSource(path)
    captions = []
    for index in range(len(source)):
        try:
            captions += source[index].captions
        except SampleError:
            continue
    return captions, check_source(source)


def before(path, at, added):
    content = path.read_bytes()
    path.write_bytes(content[:at] + added + content[at:])


def change(path, number, offset, value):
    """Change a field of a header, and its checksum."""
    at = headers(path)[number]
    block = bytearray(path.read_bytes()[at : at + BLOCK])
    block[offset : offset + len(value)] = value
    overwrite(path, at, with_checksum(block))


EXTENDED = {
    "digits": pax(b"1" * 60_000),
    "many digits": pax(b"1" * 400_000),
    "digits and hdrcharset": pax(b"1 hdrcharset" * 5_000),
    "long names of size 0": header("././@LongLink", EMPTY, b"L") * 10_000,
    "records": pax(b"5 a=\n" * 12_000) * 30,
    "chain of pax headers": pax(b"6 a=b\n") * 5_000,
    "sparse without an end": with_checksum(header("a", EMPTY, b"S")[:482] + b"\1" + bytes(29))
    * 2000,
}


@pytest.mark.slow
def test_extended_headers_take_linear_time(tmp_path):
    paths = []
    for name, added in EXTENDED.items():
        paths.append(shard(tmp_path / f"{name}.tar"))
        before(paths[-1], headers(paths[-1])[4], added)
    code = (
        "import sys, pathlib\n"
        "from elip_models.pretraining.data.tar_members import Member, read_members\n"
        "for path in map(pathlib.Path, sys.argv[1:]):\n"
        "    print(sum(isinstance(each, Member) for each in read_members(path)))"
    )
    run = [sys.executable, "-c", code, *paths]  # some took minutes
    found = subprocess.run(run, capture_output=True, text=True, timeout=60, check=True).stdout
    assert [int(each) >= 11 for each in found.split()] == [True] * len(EXTENDED)


def test_endless_zeros_end_as_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_members, "_MAX_GAP", 2**20)
    path = shard(tmp_path / "s.tar")
    with path.open("ab") as file:
        file.truncate(2**40)
    captions, report = check(path)
    assert len(captions) == 6 and report.summary().startswith("At least 1 of 7")
    assert "the rest is not read" in report.reasons[0][1]


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (b"1", "hard link"),
        (b"2", "symbolic link"),
        (b"3", "device"),
        (b"4", "device"),
        (b"6", "named pipe"),
        (b"Z", "has the type b'Z'"),
    ],
)
@pytest.mark.parametrize("name", ["k9.png", "k3.png"])
def test_links_and_devices_are_reported(tmp_path, kind, what, name):
    path = shard(tmp_path / "s.tar")
    with tarfile.open(path, "a") as tar:
        for each in (name, "README"):
            info = tarfile.TarInfo(each)
            info.type = kind
            tar.addfile(info)
    captions, report = check(path)
    is_other = name == "k9.png"
    assert len(captions) == (6 if is_other else 5)
    lost = [reason for _, reason in report.reasons]
    assert len(lost) == (1 if is_other else 2) and (what in lost[0]) == is_other
    assert not report.summary().startswith("At least")


def test_a_name_with_two_dots_is_reported(tmp_path):
    pair = [("k.png", picture()), ("k.txt", b"k"), ("k.b.png", picture(1)), ("k.b.txt", b"b")]
    more = [("._k.png", b"of another system"), ("k.b.mp4", b"none")]
    captions, report = check(shard(tmp_path / "s.tar", pair + more))
    assert captions == ["k"] and [each for each, _ in report.reasons] == ["s.tar:k.b"]
    assert "expected a name with one dot" in report.reasons[0][1]


def test_copies_of_a_sample_are_reported_one_by_one(tmp_path):
    pair = [("a.png", picture()), ("a.txt", b"a")]
    captions, report = check(
        shard(tmp_path / "s.tar", pair * 600 + [("b.png", picture()), ("b.txt", b"b")])
    )
    assert captions == ["b"] and report.summary().startswith("600 of 601 samples")


def test_a_renamed_member_makes_no_wrong_pair(tmp_path):
    path = shard(tmp_path / "s.tar")
    change(path, 1, 0, b"k3")  # the text of k0
    captions, report = check(path)
    assert captions == [f"caption of k{i}" for i in (1, 2, 4, 5)]
    assert {each for each, _ in report.reasons} == {"s.tar:k0", "s.tar:k3"}


@pytest.mark.parametrize("number", range(9))
def test_a_size_that_hides_other_members_is_seen(tmp_path, number):
    members = []
    for i in range(6):
        text = json.dumps({"caption": f"k{i}"}).encode()
        members += [(f"k{i}.json", text), (f"k{i}.png", picture(i))]
    path = shard(tmp_path / "s.tar", members)
    at = headers(path)
    change(path, number, 124, b"%011o\0" % (at[number + 3] - at[number] - BLOCK - 3))
    captions, report = check(path)
    assert len(captions) in (4, 5) and report.summary().startswith("At least")


@pytest.mark.parametrize(("size", "why"), [(7, "size of k0.txt"), (20, "zero byte")])
def test_a_size_that_is_not_that_of_the_text_is_seen(tmp_path, size, why):
    path = shard(tmp_path / "s.tar")
    change(path, 1, 124, b"%011o\0" % size)
    captions, report = check(path)
    assert len(captions) == 5 and why in report.reasons[0][1] and len(report.reasons) == 1


def test_a_short_name_behind_damage_is_not_used(tmp_path):
    members = [(f"{'n' * 110}{i}.{end}", picture(i) if end == "png" else b"%d" % i)
               for i in range(3) for end in ("png", "txt")]  # fmt: skip
    path = shard(tmp_path / "s.tar", members, format=1)
    overwrite(path, headers(path)[2] + 150, b"\xff" * 9)
    found = list(read_members(path))
    assert sum(isinstance(each, Member) for each in found) == 5
    assert all("more may be lost" in each.what for each in found if isinstance(each, Damage))
    captions, report = check(path)
    assert captions == ["0", "2"] and report.summary().startswith("At least")


@pytest.mark.parametrize("number", range(2, 12, 2))
def test_a_truncated_tar_that_is_filled_with_zeros_is_reported(tmp_path, number):
    path = shard(tmp_path / "s.tar")
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("z.mp4")
        info.size = 20_000
        tar.addfile(info, io.BytesIO(bytes(20_000)))
    content = path.read_bytes()
    at = headers(path)[number]
    path.write_bytes(content[:at] + bytes(len(content) - at))
    captions, report = check(path)
    assert len(captions) == number // 2 and report.summary().startswith("At least 1 of")
    assert "are zero, which is not the padding of a tar" in report.reasons[0][1]


def test_a_sample_that_is_zeroed_between_others_is_reported(tmp_path):
    path = shard(tmp_path / "s.tar")
    at = headers(path)
    overwrite(path, at[4], bytes(at[6] - at[4]))
    captions, report = check(path)
    assert len(captions) == 5 and report.summary().startswith("At least 1 of 6")


def test_every_truncation_says_at_least(tmp_path):
    content = shard(tmp_path / "whole.tar").read_bytes()
    end = headers(tmp_path / "whole.tar")[-1] + 2 * BLOCK
    for size in range(BLOCK, end, 391):
        path = tmp_path / "s.tar"
        path.write_bytes(content[:size])
        captions, report = check(path)
        assert len(captions) <= 6 and report.summary().startswith("At least")


@pytest.mark.parametrize("value", [2**63, 2**80])
def test_sizes_beyond_64_bits_are_damage(tmp_path, value):
    path = shard(tmp_path / "s.tar")
    change(path, 4, 124, b"\x80" + value.to_bytes(11, "big"))
    captions, report = check(path)
    assert len(captions) == 5 and report.summary().startswith("At least 2 of 7")


def test_a_global_header_that_renames_is_damage(tmp_path):
    path = shard(tmp_path / "s.tar")
    before(path, headers(path)[4], pax(b"12 path=k.png"[:12] + b"\n", b"g"))
    before(path, headers(path)[4], pax(b"11 a=value\n", b"g"))
    captions, report = check(path)
    assert len(captions) == 6 and report.summary().startswith("At least 1 of 7")


def test_names_that_differ_only_by_invalid_bytes_stay_apart(tmp_path):
    path = shard(tmp_path / "s.tar", [("a\\xff.txt", b"wrong"), ("aXb.png", picture())])
    change(path, 1, 1, b"\xff.png\0")
    captions, report = check(path)
    assert captions == [] and len(report.reasons) == 2
