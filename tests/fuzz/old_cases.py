"""Damaged images, tars, lists, captions, model folders and command lines."""

import json
import shutil

from elip_models.data import JsonSource, ShardSource, check_source
from elip_models.models.registry import create_model
from tests.fuzz.harness import Loss, command, kind, refused
from tests.helpers.damage import picture, shard

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
COUNT = 5  # samples of a case


def save_model(folder):
    """A tiny model and its tokenizer, of which each case damages a copy."""
    from elip_models.data import train_tokenizer

    tokenizer = train_tokenizer(["a red dog", "two cats"] * 9, 300)
    sizes = {"vision_width": 32, "vision_heads": 2, "text_width": 32, "text_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = create_model("clip_tiny", vocab_size=len(tokenizer), **sizes, **ends)
    model.save_pretrained(folder, tokenizer=tokenizer)


def damage(content, rng):
    """Bytes with one of six kinds of damage."""
    at, length = rng.randrange(len(content)), rng.choice((1, 4, 512))
    junk = rng.randbytes(length)
    return rng.choice(
        (
            content[:at],
            content[:at] + junk + content[at + length :],
            content[:at] + bytes(length) + content[at + length :],
            content[:at] + content[at + length :],
            content[:at] + junk + content[at:],
            content[:at] + content[at : at + length] + content[at:],
        )
    )


def check_counts(source, put_in):
    """Each sample that was put in is read, or something is reported."""
    report = check_source(source)
    read = report.seen - len(report.reasons)
    if read < put_in and not report.reasons:
        raise Loss(f"{put_in - read} samples are lost without a word")
    return "reported" if report.reasons else "read"


@kind()
def images(folder, rng):
    for i in range(COUNT):
        content = picture(i, rng.choice(FORMATS))
        (folder / f"{i}.png").write_bytes(damage(content, rng) if i else content)
    entries = [{"image": f"{i}.png", "caption": f"number {i}"} for i in range(COUNT)]
    (folder / "list.json").write_text(json.dumps(entries))
    return check_counts(JsonSource(folder / "list.json"), COUNT)


@kind()
def lists(folder, rng):
    (folder / "a.png").write_bytes(picture())
    entries = [{"image": "a.png", "caption": [f"number {i}", "näher"]} for i in range(COUNT)]
    content = json.dumps(entries, ensure_ascii=False).encode()
    (folder / "list.json").write_bytes(damage(content, rng))
    try:
        source = JsonSource(folder / "list.json")
    except ValueError as error:
        return refused(error, "list.json")
    return check_counts(source, len(source))


@kind()
def captions(folder, rng):
    def text():
        codes = (rng.choice((rng.randrange(0x110000), rng.randrange(32, 127))) for _ in range(20))
        return "".join(map(chr, codes))

    (folder / "a.png").write_bytes(picture())
    entries = [{"image": "a.png", "caption": text()} for _ in range(COUNT)]
    (folder / "list.json").write_text(json.dumps(entries))
    return check_counts(JsonSource(folder / "list.json"), COUNT)


@kind(share=0.3, prepare=save_model)
def models(folder, rng, prepared):
    model = shutil.copytree(prepared, folder / "model")
    path = rng.choice(sorted(model.iterdir()))
    path.write_bytes(damage(path.read_bytes(), rng))
    return command(["eval", "retrieval", "--model", str(model), "--data", "emoji_scenes:size=3"])
