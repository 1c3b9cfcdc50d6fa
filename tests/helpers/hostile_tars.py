"""Tars whose headers make `tarfile` of some releases of Python run for ever, or for hours."""

import tarfile

from tests.helpers.damage import BLOCK, picture

SAMPLE = (("a.png", picture()), ("a.txt", b"a caption"))


def member(name, content, size=None, kind=tarfile.REGTYPE):
    """Return header and content; `size` replaces the size in the header."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content), kind
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if size is not None:
        header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content + bytes(-len(content) % BLOCK)


def pax(content):
    return member("pax", content, kind=tarfile.XHDTYPE)


def record(key, value):
    """Return a record of a pax header, whose length counts itself."""
    length = len(key) + len(value) + 3
    length += len(str(length + len(str(length))))
    return b"%d %s=%s\n" % (length, key, value)


WHOLE = b"".join(member(name, content) for name, content in SAMPLE)
END = bytes(2 * BLOCK)
BAD = {
    "negative size": member("b.png", b"", size=-5 * BLOCK),
    "size of a step back": member("b.png", b"", size=-BLOCK),
    "negative size in a pax header": pax(record(b"size", b"-5120")) + member("b.png", b""),
    "negative size of a sparse file": member(
        "b", b"", size=-5 * BLOCK, kind=tarfile.GNUTYPE_SPARSE
    ),
    "digits": pax(b"1" * 400_000) + member("b.png", b""),
    "digits in a record": pax(record(b"path", b"1" * 400_000)) + member("b.png", b""),
    "records without an end": pax(b"2 " * 200_000 + b"=") + member("b.png", b""),
    "long names": member("b", b"1" * 2**21, kind=tarfile.GNUTYPE_LONGNAME) + member("b.png", b""),
    "name of negative size": member("b", b"", size=-BLOCK, kind=tarfile.GNUTYPE_LONGNAME),
    "headers of headers": 3000 * pax(record(b"path", b"b.png")) + member("b.png", b""),
}
TARS = {name: WHOLE + bad + WHOLE + END for name, bad in BAD.items()}
TARS |= {f"{name}, first": bad + WHOLE + END for name, bad in BAD.items()}
