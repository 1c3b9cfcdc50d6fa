"""Tars with accidental damage, read as a stream reads them, and URLs with ranges.

The colour of an image and the caption both name their sample, so a wrong pair is seen. A tar has no
checksum of its data: no case changes a text or an image and keeps its header.
"""

import io
import tarfile

from PIL import Image

from elip_models.images import SampleError
from elip_models.pretraining.data import open_stream
from elip_models.pretraining.data.streams import DownloadedShard
from tests.fuzz.harness import Loss, kind, refused
from tests.helpers.damage import BLOCK, shard

COLOURS = ((200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200), (200, 0, 200))
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


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
    """Where the members are."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [member.offset for member in tar]


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


def block_lost(content, rng):
    at = rng.randrange(max(offsets(content)) // BLOCK + 2) * BLOCK
    return content[:at] + content[at + BLOCK :]


def blocks_added(content, rng):
    at = rng.randrange(max(offsets(content)) // BLOCK + 2) * BLOCK
    added = rng.choice((bytes(BLOCK), rng.randbytes(BLOCK), content[at : at + BLOCK]))
    return content[:at] + added * rng.randint(1, 40) + content[at:]


def bytes_shifted(content, rng):
    at = rng.randrange(max(offsets(content)))
    return content[:at] + rng.choice((content[at + 1 :], b"\xff" + content[at:]))


DAMAGES = (cut, zeros_to_the_end, junk_in_headers, block_lost, blocks_added, bytes_shifted)


def check_pair(sample):
    """Raise Loss unless the caption is that of the image."""
    number = COLOURS.index(sample.image.getpixel((0, 0)))
    if sample.captions != (caption(number).strip(),):
        raise Loss(f"{sample.id}: {sample.captions} for the image of {number}")


@kind(share=4)
def tars(folder, rng):
    path, written = whole(folder, rng)
    path.write_bytes(rng.choice(DAMAGES)(path.read_bytes(), rng))
    downloaded = DownloadedShard(f"file://{path}")
    if downloaded.problem:
        return refused(ValueError(f"{downloaded.name}: {downloaded.problem}"), "s.tar")
    lost = 0
    for index in range(len(downloaded)):
        try:
            check_pair(downloaded[index])
        except SampleError:
            lost += 1
    if len(downloaded) < written:
        raise Loss(f"read {len(downloaded)} of {written}, and no damage is reported")
    return "reported" if lost else "read"


PIECES = (
    *("https://h/", "https://user:secret-1@h/", "memory://h/", "a", ".tar"),
    *("{0..9}", "{0000..0099}", "{0..99999999999}", "{9..0}", "{", "}", "{0..0}", "{0..9}" * 2000),
    *("{{0..9}..{0..9}}", "{" + "9" * 5000 + ".." + "9" * 5001 + "}", "?X-Amz-Signature=secret-1"),
    *(",samples=5", ",samples=" + "9" * 5000, ",resample=1", "#", "[", "]", "\0", "ä"),
)


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
        if not str(error).startswith(("spec: ", "stream: ", "samples: ", "resample: ")):
            raise Loss(f"no argument is named: {error}") from error
        return "refused"
    if len(source.shards) > 10**6 or not len(source.shards):
        raise Loss(f"{len(source.shards)} shards")
    return "read"
