"""Damaged and hostile tars, on disk and as a stream, and ranges of URLs.

The colour of an image and the caption both name their sample, so a wrong pair is seen. A tar has no
checksum of its data: no case changes a text or an image and keeps its header.
"""

import io
import tarfile

from PIL import Image

from elip_models.images import SampleError
from elip_models.pretraining.data import ShardSource, open_stream
from elip_models.pretraining.data.read_errors import SkipReport
from elip_models.pretraining.data.stream_source import ShardEnd, decode_stored
from elip_models.pretraining.data.tar_members import BLOCK
from tests.fuzz.harness import Loss, kind, refused
from tests.helpers.damage import header, shard, with_checksum

COLOURS = ((200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200), (200, 0, 200))
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
KINDS = [bytes([each]) for each in range(256)]


def caption(number):
    return f"number {number} " * 3


def image(number, rng):
    file = io.BytesIO()
    size = rng.choice((4, 30, 90))
    picture = Image.new("RGB", (size, size), COLOURS[number])
    picture.putpixel((size - 1, size - 1), (255, 255, 255))
    picture.save(file, "PNG")
    return file.getvalue()


def whole(folder, rng):
    """A tar of up to six samples, and how many they are."""
    count = rng.randint(1, 6)
    prefix = rng.choice(("k", "ä", "d" * 60 + "/" + "n" * 60, "k\\"))
    members = []
    for number in range(count):
        text = (".txt", caption(number).encode())
        pair = [(".png", image(number, rng)), text]
        rng.shuffle(pair)
        members += [(f"{prefix}{number}{extension}", content) for extension, content in pair]
    return shard(folder / "s.tar", members, rng.choice(FORMATS)), count


def offsets(content):
    """Where the blocks are that have a valid header."""
    found = []
    for at in range(0, len(content), BLOCK):
        try:
            tarfile.TarInfo.frombuf(content[at : at + BLOCK], "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError):
            continue
        found.append(at)
    return found


def cut(content, rng):
    return content[: rng.randrange(len(content))]


def zeros_to_the_end(content, rng):
    """A tail of zeros that is longer than the padding of a tar; a shorter one is not seen."""
    at = rng.choice((rng.randrange(len(content)), rng.choice(offsets(content))))
    return content[:at] + bytes(len(content) - at + rng.choice((11_000, 20_480, 10**6)))


def junk_in_headers(content, rng):
    changed = bytearray(content)
    for at in rng.choices(offsets(content), k=rng.randint(1, 3)):
        first = at + rng.randrange(BLOCK)
        length = min(rng.choice((1, 4, 512)), at + BLOCK - first)
        changed[first : first + length] = rng.choice((rng.randbytes(length), bytes(length)))
    return bytes(changed)


def blocks_lost(content, rng):
    """Lost from a header on, or one block: a text and the next header make a valid tar again."""
    at, count = rng.randrange(len(content) // BLOCK) * BLOCK, 1
    if rng.random() < 0.5:
        at, count = rng.choice(offsets(content)), rng.randint(1, 3)
    return content[:at] + content[at + BLOCK * count :]


def blocks_added(content, rng):
    at = rng.randrange(len(content) // BLOCK) * BLOCK
    added = rng.choice((bytes(BLOCK), rng.randbytes(BLOCK), content[at : at + BLOCK]))
    return content[:at] + added * rng.randint(1, 40) + content[at:]


def bytes_shifted(content, rng):
    at = rng.randrange(len(content))
    return content[:at] + rng.choice((content[at + 1 :], b"\xff" + content[at:]))


def sizes(content, rng):
    """A size that is wrong, in a valid header."""
    size = rng.choice(
        (
            b"%011o\0" % rng.randrange(rng.choice((600, len(content), 2**33))),
            b"\x80" + rng.randrange(2 ** rng.randint(1, 87)).to_bytes(11, "big"),
            b"\xff" * 8 + rng.randbytes(4),
            rng.randbytes(12),
            b"           \0",
            b"-0000000777\0",
        )
    )
    return field(content, rng, 124, size)


def kinds(content, rng):
    return field(
        content, rng, 156, rng.choice((*KINDS, *KINDS[48:56] * 30, *(b"x", b"L", b"S") * 50))
    )


def names(content, rng):
    """The name of one member; a tar that has none of a sample's names is one without the sample."""
    name = rng.choice(
        (b"", b"/", b"..", b"../a.png", b"\0a.png", b"\xff\xfe.png", b"a\nb.txt", b"x" * 100)
    )
    return field(content, rng, 0, name.ljust(100, b"\0"), most=1)


def field(content, rng, offset, value, most=2):
    """A field of up to `most` headers changed, with the checksum that holds then."""
    changed = bytearray(content)
    for at in rng.choices(offsets(content), k=rng.randint(1, most)):
        changed[at + offset : at + offset + len(value)] = value
        changed[at : at + BLOCK] = with_checksum(changed[at : at + BLOCK])
    return bytes(changed)


def members_added(content, rng):
    at = rng.choice(offsets(content))
    return content[:at] + rng.choice(ADDED)(rng) + content[at:]


def pax(rng, kind=b"x"):
    """An extended header whose records may be malformed."""
    record = rng.choice(
        (
            b"%d path=%s\n" % (rng.randrange(40), b"z" * rng.randrange(40)),
            b"0" * rng.randrange(100_000),
            b"1" * rng.randrange(100_000) + b" hdrcharset",
            b"14 size=%d\n" % rng.randrange(2**80),
            b"30 GNU.sparse.map=1,2,3,4,5,67\n",
            b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n",
            b"11 path=k1\n" * rng.randrange(300),
            rng.randbytes(rng.randrange(1000)),
        )
    )
    size = rng.choice((len(record), len(record), rng.randrange(2**33)))
    return header("././@PaxHeader", b"%011o\0" % size, kind) + filled(record)


def filled(content):
    return content + bytes(-len(content) % BLOCK)


def long_name(rng):
    name = rng.choice((b"", b"k1.png\0", b"z" * rng.randrange(70_000), rng.randbytes(300)))
    return header("././@LongLink", b"%011o\0" % len(name), rng.choice((b"L", b"K"))) + filled(name)


ADDED = (
    pax,
    long_name,
    lambda rng: pax(rng, rng.choice((b"g", b"X"))),
    lambda rng: long_name(rng) * rng.randint(2, 200),
    lambda rng: header("././@LongLink", b"%011o\0" % 0, b"L") * rng.randint(1, 3000),
    lambda rng: header(f"k{rng.randrange(9)}.png", b"%011o\0" % 0, rng.choice(KINDS[48:56])),
    lambda rng: header("folder/", b"%011o\0" % 0, b"5") * rng.randint(1, 3000),
    lambda rng: header("k9.png", b"%011o\0" % 0, b"S")[:482] + b"\1" * 30,
    lambda rng: b"".join(header(f"m{i}.cls", b"%011o\0" % 0) for i in range(rng.randrange(3000))),
)  # fmt: skip
DAMAGES = (
    *(cut, zeros_to_the_end, junk_in_headers, blocks_lost, blocks_added, bytes_shifted),
    *(sizes, kinds, names, members_added),
)
SHORTER = (cut, zeros_to_the_end, blocks_lost)


def hostile(folder, rng):
    """A damaged tar, and the number of samples that were written to it."""
    path, written = whole(folder, rng)
    content = path.read_bytes()
    damages = DAMAGES
    for _ in range(rng.choice((1, 1, 1, 2))):
        if offsets(content):
            damage = rng.choice(damages)
            content = damage(content, rng)
            if damage in SHORTER:  # two of them may leave a valid tar of fewer samples
                damages = [each for each in DAMAGES if each not in SHORTER]
    path.write_bytes(content)
    return path, written


def check_pair(sample):
    """Raise Loss unless the caption is that of the image."""
    number = COLOURS.index(sample.image.getpixel((0, 0)))
    if sample.captions != (caption(number).strip(),):
        raise Loss(f"{sample.id}: {sample.captions} for the image of {number}")


def judged(read, report, written):
    """What became of a tar: each sample is read or reported, or "at least" is."""
    summary = report.summary()
    if read + len(report.reasons) < written and not summary.startswith("At least"):
        raise Loss(f"read {read} of {written}: {summary}")
    return "reported" if report.reasons else "read"


@kind(share=3)
def tars(folder, rng):
    path, written = hostile(folder, rng)
    try:
        source = ShardSource(path)
    except ValueError as error:
        return refused(error, "s.tar")
    read, report = 0, SkipReport(length=len(source))
    for index in range(len(source)):
        try:
            check_pair(source[index])
            read += 1
            report.record([], 1)
        except SampleError as error:
            report.record([(error.id, error.reason, index)], 1)
    return judged(read, report, written)


@kind(share=2)
def streams(folder, rng):
    path, written = hostile(folder, rng)
    command = f"pipe:cat {path}" + rng.choice(("", "; exit 3"))
    url = rng.choice((command, f"file://{path}"))
    read, report = 0, SkipReport()
    for each in open_stream({"stream": url, "samples": 6}).read(0):
        try:
            if isinstance(each, ShardEnd):
                each.check()
                continue
            check_pair(decode_stored(each))
            read += 1
            report.record([], 1)
        except SampleError as error:
            report.record([(error.id, error.reason)], 1)
            if command == url and str(path) in report.summary():
                raise Loss(f"the command is shown: {report.summary()}") from error
    return judged(read, report, written)


PIECES = (
    *("https://h/", "https://user:secret-1@h/", "pipe:curl -H 'Bearer secret-1' ", "a", ".tar"),
    *("{0..9}", "{0000..0099}", "{0..99999999999}", "{9..0}", "{", "}", "{0..0}", "{0..9}" * 2000),
    *("{{0..9}..{0..9}}", "{" + "9" * 5000 + ".." + "9" * 5001 + "}", "?X-Amz-Signature=secret-1"),
    *(",samples=5", ",samples=" + "9" * 5000, ",shuffle=1", ",shuffle=1" * 20_000),
    *("#", "[", "]", "\0", "ä"),
)  # fmt: skip


@kind()
def brace_urls(folder, rng):
    spec = "".join([rng.choice(PIECES[:3]), *rng.choices(PIECES, k=rng.randint(1, 6))])
    if rng.random() < 0.3:
        spec = {"stream": [spec, rng.choice(PIECES[:3]) + "b.tar"], "samples": 5}
    try:
        source = open_stream(spec, samples=rng.choice((None, 5)))
    except (TypeError, ValueError) as error:
        if "secret" in str(error):
            raise Loss(f"a secret is shown: {error}") from error
        if not str(error).startswith(("spec: ", "stream: ", "samples: ", "shuffle: ")):
            raise Loss(f"no argument is named: {error}") from error
        return "refused"
    if len(source.shards) > 10**6 or not len(source.shards):
        raise Loss(f"{len(source.shards)} shards")
    return "read"
