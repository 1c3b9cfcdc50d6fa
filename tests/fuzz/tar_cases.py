"""Tar files with damaged or forged headers: each reader ends soon, with an error of its own."""

import contextlib
import io
import tarfile

from elip_models.cli import main
from elip_models.embedding.source import open_images, read_payload
from elip_models.images import SampleError
from elip_models.pretraining.data import check_source, open_source
from elip_models.validation import ConfigError, DataError
from tests.fuzz.harness import Loss, kind, refused
from tests.helpers.damage import BLOCK, damaged, headers, shard

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
FIELDS = {"name": (0, 100), "size": (124, 136), "type": (156, 157), "prefix": (345, 500)}
FIELDS |= {"checksum": (148, 156), "magic": (257, 265), "sparse": (386, 512)}
SIZES = (-1, -512, -1024, -(2**40), 0, 1, 511, 513, 2**31, 2**33, 2**62, 2**87)
TYPES = b"01234567LKxgSDVNM\0 "
RECORDS = (
    b"9" * 400_000 + b" path=a.png\n",
    b"1" * 400_000,
    b"0 path=a.png\n",
    b"-5 path=a\n",
    b"13 size=-512\n",
    b"30 size=99999999999999999999\n",
    b"20 path=\xff\xfe\xff\xff.png\n",
    b"11 path=a\0\n",
    b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n",
    b"37 GNU.sparse.numblocks=99999999999\n",
    b"33 GNU.sparse.map=0,1,-5,9" + b",1" * 9 + b"\n",
    b"26 GNU.sparse.size=-99999\n",
    b"12 mtime=nan\n",
    b"8 a=b\n" * 50_000,
    b"=" * 100_000,
    b"20 hdrcharset=BINARY\n",
)


def number(value):
    """A size as 12 bytes, in base 256 where octal digits have no such value."""
    if 0 <= value < 8**11:
        return b"%011o\0" % value
    return (value % 2**96).to_bytes(12, "big") if value < 0 else b"\x80" + value.to_bytes(11, "big")


def with_checksum(header):
    """A header with the checksum of its bytes."""
    total = sum(header[:148]) + 8 * 32 + sum(header[156:512])
    return header[:148] + b"%06o\0 " % total + header[156:]


def changed(header, rng):
    """A header with another field, whose checksum is right."""
    field = rng.choice(list(FIELDS))
    start, stop = FIELDS[field]
    junk = rng.randbytes(stop - start), b"9" * (stop - start), bytes(stop - start), b" " * 12
    value = rng.choice(junk)
    if field == "size":
        value = rng.choice((number(rng.choice(SIZES)), value))
    elif field == "type":
        value = bytes([rng.choice(TYPES)])
    header = header[:start] + value[: stop - start].ljust(stop - start, b"\0") + header[stop:]
    return header if field == "checksum" else with_checksum(header)


def extended(rng):
    """A member that describes the next one: records of pax, or a long name of GNU."""
    content = b"".join(rng.choice(RECORDS) for _ in range(rng.choice((1, 1, 2))))
    info = tarfile.TarInfo("a")
    info.type, info.size = bytes([rng.choice(b"xxxxgLKX")]), len(content)
    if rng.random() < 0.3:
        info.size = rng.choice((0, 1, 2**33))
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % BLOCK)


def hostile_tar(folder, rng):
    path = shard(folder / "a.tar", format=rng.choice(FORMATS))
    starts, content = headers(path), path.read_bytes()
    for _ in range(rng.choice((1, 1, 2))):
        at, way = rng.choice(starts), rng.random()
        if way < 0.5:
            content = content[:at] + changed(content[at : at + BLOCK], rng) + content[at + BLOCK :]
        elif way < 0.9:
            content = content[:at] + extended(rng) + content[at:]
        else:
            content = damaged(content, rng)
    path.write_bytes(content)
    return path


def embedded(path):
    """Read a tar as `elip embed` does."""
    listed = open_images(path)
    payloads = [*listed.payloads(0, len(listed))]
    if len(payloads) != len(listed) or len({*listed.keys}) != len(listed):
        raise Loss("other images than keys")
    for payload in payloads:
        with contextlib.suppress(SampleError):
            read_payload(payload)


def trained(path):
    """Read a tar as `elip train` does."""
    check_source(open_source([str(path)], image_size=32), None)


def checked(path):
    """Run `elip data check`."""
    said, status = io.StringIO(), 0
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            main(["data", "check", str(path)])
    except SystemExit as exit_:
        status = exit_.code or 0
    if status == 2:
        raise ConfigError(said.getvalue())
    if status not in (0, 1) or "Traceback" in said.getvalue():
        raise Loss(f"exit status {status}: {said.getvalue()[-300:]}")


@kind(share=1)
def tars(folder, rng):
    path, read = hostile_tar(folder, rng), rng.choice((embedded, trained, checked))
    try:
        read(path)
    except (ConfigError, DataError, SampleError, OSError, ValueError) as error:
        return refused(error, ":")
    return "read"
