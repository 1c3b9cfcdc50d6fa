"""Images: damaged bytes, and formats that claim more than they hold or cost more than they show."""

import io
import json
import struct
import zlib

from PIL import Image

from elip_models.pretraining.data import JsonSource, check_source
from tests.fuzz.harness import Loss, kind
from tests.helpers.damage import damaged, picture

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P", "RGB"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "TIFF": ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "F", "LAB"),
}
COUNT = 5  # samples of a case


def of_any_mode(rng):
    """A small whole image."""
    format = rng.choice(FORMATS)
    image = Image.new(rng.choice(MODES[format]), (rng.randint(1, 40), rng.randint(1, 40)))
    options = {"JPEG": {"progressive": True}, "PNG": {"interlace": 1}, "WEBP": {"lossless": True}}
    compression = rng.choice((None, "jpeg", "tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd"))
    options["TIFF"] = {"compression": compression}
    file = io.BytesIO()
    try:
        image.save(file, format, **rng.choice((options.get(format, {}), {})))
    except (OSError, KeyError, ValueError, RuntimeError):  # the mode has no such compression
        return picture(0, format)
    return file.getvalue()


def frames(rng):
    """Several frames, of which the first is read."""
    format = rng.choice(("GIF", "PNG", "WEBP", "TIFF", "MPO"))
    size = rng.choice(((8, 8), (200, 200)))
    others = [Image.new("RGB", size, (i % 256, 9, 9)) for i in range(rng.choice((2, 60)))]
    file = io.BytesIO()
    others[0].save(file, format, save_all=True, append_images=others[1:])
    return file.getvalue()


def jpeg_scans(rng):
    """A progressive JPEG with one of its scans repeated up to 20,000 times."""
    side = rng.choice((8, 64, 512, 2048))
    file = io.BytesIO()
    Image.new("RGB", (side, side), "grey").save(file, "JPEG", progressive=True)
    content = file.getvalue()
    last = content[content.rindex(b"\xff\xda") : -2]
    noise = rng.choice(
        (b"", b"\xff\x01", b"\xff\xff", b"\xff\xd0", b"\xff\xfe\0\2", b"\xff\xdd\0\4\0\1")
    )
    return content[:-2] + (noise + last) * int(10 ** rng.uniform(0, 4.3)) + content[-2:]


def jpeg_segments(rng):
    """A JPEG with segments of any kind before its first scan."""
    content = picture(0, "JPEG")
    segments = b""
    for _ in range(int(10 ** rng.uniform(0, 3))):
        marker, size = rng.randrange(0xC0, 0x100), rng.choice((0, 1, 2, 60, 0xFFFF))
        start = rng.choice((b"Exif\0\0MM\0*\0\0\0\x08", b"ICC_PROFILE\0\1\1", b"MPF\0", b"Adobe"))
        body = (start + rng.randbytes(60))[: max(0, size - 2)]
        segments += bytes((0xFF, marker)) + size.to_bytes(2) + body
    return content[:2] + segments + content[2:]


def chunk(name, content, rng):
    checksum = zlib.crc32(name + content) ^ (rng.random() < 0.05)
    length = len(content) if rng.random() > 0.05 else rng.choice((0, 2**31, 2**32 - 1))
    return struct.pack(">I", length) + name + content + struct.pack(">I", checksum)


def png_chunks(rng):
    """A PNG with chunks of any kind; texts and profiles can expand a thousand times."""
    names = (
        b"tEXt",
        b"zTXt",
        b"iTXt",
        b"iCCP",
        b"tRNS",
        b"PLTE",
        b"acTL",
        b"fcTL",
        b"fdAT",
        b"eXIf",
    )
    content, bomb = picture(0, "PNG"), zlib.compress(bytes(10 ** rng.randint(3, 7)))
    bodies = (
        b"a\0\0" + bomb,
        b"a\0\1\0\0\0" + bomb,
        rng.randbytes(26),
        b"",
        struct.pack(">II", 9, 0),
    )
    extra = b"".join(
        chunk(rng.choice(names), rng.choice(bodies), rng) for _ in range(rng.choice((1, 9, 300)))
    )
    at = rng.choice((33, len(content) - 12))
    return content[:at] + extra + content[at:]


def png_pixels(rng):
    """A PNG of any size and kind of pixels, whose data are all zero."""
    size = [rng.choice((0, 1, 3, 700, 4000, 8000, 2**31 - 1, 2**32 - 1)) for _ in range(2)]
    depth, colour = rng.choice((1, 2, 4, 8, 16, 3)), rng.choice((0, 2, 3, 4, 6, 1))
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, rng.choice((0, 1, 2)))
    data = zlib.compress(bytes(rng.choice((9, 10**6, 10**8))))
    chunks = ((b"IHDR", header), (b"PLTE", rng.randbytes(30)), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, body, rng) for name, body in chunks)


def tiff_tags(rng):
    """A TIFF with tags of any type, count and value, and folders that may form a circle."""
    known = (
        254,
        256,
        257,
        258,
        259,
        262,
        273,
        277,
        278,
        279,
        284,
        317,
        320,
        322,
        323,
        324,
        330,
        338,
    )
    tags = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: 64}
    entries = []
    for tag in {*tags, *rng.sample(known, 5), *rng.choices(range(2**16), k=3)}:
        value = tags.get(tag, 1)
        if rng.random() < 0.25 or tag not in tags:
            value = rng.choice((0, 1, 2, 5, 7, 8, 32773, 34925, 50000, 2**16, 2**31, 2**32 - 1))
        count = 1 if rng.random() < 0.8 else rng.choice((0, 2, 1000, 2**28, 2**32 - 1))
        type = 4 if rng.random() < 0.8 else rng.randrange(20)
        entries.append(struct.pack("<HHII", tag, type, count, value))
    following = rng.choice((0, 8, 72, 2**31))
    folder = struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", following)
    return b"II*\0" + struct.pack("<I", 72) + rng.randbytes(64) + folder + rng.randbytes(99)


def gif_blocks(rng):
    """A GIF with blocks of any kind, or much that is none."""
    screen = struct.pack("<HHBBB", *(rng.choice((1, 9, 3000, 65535)) for _ in range(2)), 0xF0, 0, 0)
    blocks = b""
    for _ in range(rng.choice((1, 10, 1000))):
        size = struct.pack("<HHHH", *(rng.choice((0, 1, 9, 9000, 65535)) for _ in range(4)))
        frame = b"," + size + bytes((rng.randrange(256), rng.randrange(13)))
        data = rng.choice((b"", b"\xff" + rng.randbytes(255), b"\2\4\1"))
        label = bytes((rng.choice((0xF9, 0xFE, 0xFF, 1)),))
        blocks += rng.choice(
            (frame + data + b"\0", b"!" + label + b"\4" + rng.randbytes(4) + b"\0", b"\0" * 999)
        )
    return b"GIF89a" + screen + rng.randbytes(6) + blocks + b";"


def of_another_format(rng):
    """What other programs would run or decode."""
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n/a {a} def a\n"
    vector = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    others = [
        postscript,
        vector,
        b"P6 9 9 255 ",
        b"\0\0\1\0",
        b"8BPS\0\1",
        b"BM" + bytes(60),
        b"SIMPLE",
    ]
    return rng.choice([*others, b"", b"\0", rng.randbytes(99)]) + rng.randbytes(rng.choice((0, 99)))


MADE = (
    jpeg_scans,
    jpeg_segments,
    png_chunks,
    png_pixels,
    tiff_tags,
    gif_blocks,
    frames,
    of_any_mode,
)


def check_counts(folder, contents):
    """Each image is read, or reported with its entry."""
    for i, content in enumerate(contents):
        (folder / f"{i}.png").write_bytes(content)
    entries = [{"image": f"{i}.png", "caption": f"number {i}"} for i in range(len(contents))]
    (folder / "list.json").write_text(json.dumps(entries))
    source = JsonSource(folder / "list.json")
    report = check_source(source)
    if report.seen != len(contents) or len(report.reasons) >= len(contents):
        raise Loss(f"of {len(contents)}, of which the first is whole: {report.summary()}")
    report.summary().encode()
    return "reported" if report.reasons else "read"


@kind()
def images(folder, rng):
    whole = [picture(i, rng.choice(FORMATS)) for i in range(COUNT)]
    return check_counts(folder, [whole[0], *(damaged(each, rng) for each in whole[1:])])


@kind(share=2)
def made_images(folder, rng):
    content = rng.choice((*MADE, of_another_format))(rng)
    if rng.random() < 0.3 and content:
        content = damaged(content, rng)
    return check_counts(folder, [picture(), content])
