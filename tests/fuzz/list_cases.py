"""Lists of images and texts: entries of wrong kinds, hostile texts, damaged bytes."""

import copy
import json
import re

from elip_models.images import SampleError
from elip_models.pretraining.data import JsonSource, check_source, open_examples, open_source
from elip_models.pretraining.data.shared_images import group_by_image
from tests.fuzz.harness import Loss, kind, refused
from tests.helpers.damage import damaged, picture

IMAGES = ("a.png", "b.png")


def deep(rng):
    """A text that `as_json` replaces by lists in each other."""
    return f"DEEP {rng.choice((5, 200, 900, 960, 985, 10**5))}"


def number(rng):
    big = (2**24 + 1, 2**31, 2**63, 2**64, 10**30, 10**400, -(2**63) - 1)
    return rng.choice((0, -1, 0.5, 1e308, 1e-320, *map(float, ("nan", "inf", "-inf")), *big))


def text(rng):
    words = (
        "",
        " \n",
        "\0",
        "a\0b",
        "\ud800",
        "x\udfff",
        "😀",
        "\u202e",
        "é",
        ".",
        "/",
        "/dev/zero",
    )
    paths = ("..", "a.png/", "a.png/b", "missing.png", "a" * 256, "b/" * 3000, "~", "~x", "a\nb")
    codes = "".join(chr(rng.choice((rng.randrange(0x110000), 97))) for _ in range(9))
    return rng.choice((*words, *paths, codes, "long " * rng.choice((10, 10**5)), "-", "nan"))


def hostile(rng):
    """A value of any kind."""
    empty = rng.choice((None, True, False, [], {}, [[]], [None], {"image": "a.png"}, [True], "a"))
    pick = rng.choice((deep, number, text, text, lambda _: empty))
    value = pick(rng)
    return rng.choice((value, value, value, [value], [value] * 4, {"caption": value}))


def places(value, path=()):
    """The paths of all values inside of a value."""
    yield path
    holds = {dict: dict.items, list: enumerate}.get(type(value), lambda _: ())
    for key, each in holds(value):
        yield from places(each, (*path, key))


def changed(content, rng):
    """The content with some values replaced, removed, repeated or renamed."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        found = [path for path in places(content) if path]
        if not found or rng.random() < 0.02:
            return hostile(rng)
        *path, last = rng.choice(found)
        holder = content
        for key in path:
            holder = holder[key]
        action = rng.random()
        if action < 0.75:
            is_text = isinstance(holder[last], str) and rng.random() < 0.7
            holder[last] = text(rng) if is_text else hostile(rng)
        elif action < 0.85:
            del holder[last]
        elif isinstance(holder, dict):
            holder[rng.choice((text(rng), "boxes", "image_id", "id"))] = holder.pop(last)
        else:
            holder.append(holder[last])
    return content


def as_json(content, rng):
    """Bytes of a file: JSON, and some of it with a key given twice, or damaged."""
    written = json.dumps(content, ensure_ascii=rng.random() < 0.7)
    if rng.random() < 0.1:
        written = written.replace('"caption":', '"caption": "twice", "caption":', 1)
    written = re.sub('"DEEP ([0-9]+)"', lambda m: "[" * int(m[1]) + "]" * int(m[1]), written)
    written = written.encode(errors="surrogatepass")
    return damaged(written, rng) if rng.random() < 0.2 else written


def listed(rng):
    box = [[[0, 0, 3, 4]], [[1, 1.5, 2, 2], [0, 0, 1, 1]]]
    entry = {"image": "a.png", "caption": ["one", "two"], "boxes": box, "image_id": 3}
    return [entry, *({"image": each, "caption": "a text"} for each in IMAGES)]


def karpathy(rng):
    image = {"filename": "a.png", "filepath": ".", "split": "test", "cocoid": 4}
    sentences = [{"raw": "one"}, {"raw": "two"}]
    return {"images": [image | {"sentences": sentences, "imgid": i} for i in range(3)]}


def coco(rng):
    images = [{"id": i, "file_name": each} for i, each in enumerate(IMAGES)]
    texts = [{"image_id": rng.randrange(3), "id": i, "caption": f"text {i}"} for i in range(5)]
    return {"images": images, "annotations": texts}


def read_all(source):
    """Read a source in each way, and return whether something is reported."""
    report = check_source(source)
    read = 0
    for index in range(len(source)):
        captions = source.captions(index)
        try:
            sample = source[index]
        except SampleError:
            continue
        read += 1
        if sample.captions != captions or not all(captions):
            raise Loss(f"captions {captions} of a sample with {sample.captions}")
        masks = [source.named_mask(index, place) for place in range(len(captions))]
        if any(mask.shape != sample.image.size[::-1] for mask in masks):
            raise Loss("a mask of another size than its image")
    if read + len(report.reasons) != len(source) or report.seen != len(source):
        raise Loss(f"{read} read and {len(report.reasons)} reported of {len(source)}")
    check_source(group_by_image(source))
    report.summary().encode()
    return "reported" if report.reasons else "read"


@kind(share=2)
def lists(folder, rng):
    for each in IMAGES:
        (folder / each).write_bytes(picture())
    content = rng.choice((listed, karpathy, coco))(rng)
    if rng.random() < 0.95:
        content = changed(content, rng)
    (folder / "list.json").write_bytes(as_json(content, rng))
    options = {"split": text(rng)} if rng.random() < 0.1 else {}
    options |= {"image_root": text(rng)} if rng.random() < 0.05 else {}
    try:
        source = JsonSource(folder / "list.json", **options)
    except (ValueError, FileNotFoundError) as error:
        return refused(error, "list.json")
    return read_all(source)


@kind(share=0.5)
def coco_captions(folder, rng):
    """Each caption of a COCO file is read, or its image is reported."""
    (folder / "a.png").write_bytes(picture())
    count = rng.randint(0, 6)
    images = [{"id": 10 * i, "file_name": "a.png"} for i in range(count)]
    ids = [rng.choice((rng.randrange(12), 10 * rng.randrange(8))) for _ in range(20)]
    texts = [{"image_id": each, "caption": f"text {i}"} for i, each in enumerate(ids)]
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": texts}))
    source = JsonSource(folder / "coco.json")
    read = sum(len(source.captions(index)) for index in range(len(source)))
    absent = {each for each in ids if each % 10 or each >= 10 * count}
    without = {10 * i for i in range(count)} - set(ids)
    if read != sum(each not in absent for each in ids):
        raise Loss(f"{read} captions are read")
    if len(check_source(source).reasons) != len(absent | without):
        raise Loss(f"expected {len(absent | without)} losses: {check_source(source).summary()}")
    return "reported" if absent | without else "read"


@kind()
def captions(folder, rng):
    (folder / "a.png").write_bytes(picture())
    entries = [{"image": "a.png", "caption": text(rng)} for _ in range(6)]
    (folder / "list.json").write_text(json.dumps(entries))
    return read_all(JsonSource(folder / "list.json"))


QUESTIONS = {
    "questions": [{"question_id": i, "image_id": 1, "question": "What?"} for i in range(3)],
    "data_subtype": "val2014",
}
ANSWERS = {
    "annotations": [
        {"question_id": i, "multiple_choice_answer": "yes", "answers": [{"answer": "yes"}] * 3}
        for i in range(3)
    ]
}
TASKS = {
    "vqa": [
        {"question_id": 1, "image": "a.png", "question": "What?", "answer": ["yes", "no"]},
        {"question_id": 2, "image": "b.png", "question": "Who?", "answer": "no"},
    ],
    "entailment": [
        {"image": "a.png", "sentence": "it is red", "label": "neutral"},
        {"image": "b", "sentence": "it is blue", "label": "entailment"},
    ],
    "nlvr2": [{"images": ["a.png", "b"], "sentence": "both", "label": "True"}] * 2,
}


def task_files(folder, rng):
    """Write the files of a task, one of them hostile; return the task and their paths."""
    task = rng.choice(sorted(TASKS))
    contents = [TASKS[task]]
    if task == "vqa" and rng.random() < 0.5:
        contents = [QUESTIONS, ANSWERS]
    paths, place = [], rng.randrange(len(contents))
    for i, content in enumerate(contents):
        written = json.dumps(content).encode()
        if i == place:
            content = changed(content, rng) if rng.random() < 0.9 else content
            written = as_json(content, rng)
            if isinstance(content, list) and rng.random() < 0.3:
                written = b"\n".join(as_json(each, rng) for each in content)
        paths.append(folder / f"{i}_list.json")
        paths[-1].write_bytes(written)
    return task, paths


@kind()
def task_lists(folder, rng):
    for each in IMAGES:
        (folder / each).write_bytes(picture())
    task, paths = task_files(folder, rng)
    options = {"images": str(folder)}
    if task == "vqa":
        answers = changed(["yes", "no"], rng) if rng.random() < 0.2 else ["yes", "no"]
        (folder / "answer_list.json").write_bytes(json.dumps(answers).encode())
        options["answers"] = str(folder / "answer_list.json")
    try:
        source = open_examples(task, {"files": [*map(str, paths)], **options}, image_size=16)
    except (ValueError, FileNotFoundError) as error:
        return refused(error, "list.json")
    report = check_source(source)
    examples = [source.text_alone(index) for index in range(len(source))]
    if report.seen != len(examples) or not all(isinstance(each.text, str) for each in examples):
        raise Loss(f"{report.seen} of {len(examples)} examples")
    report.summary().encode()
    return "reported" if report.reasons else "read"


def spec(rng):
    """A specification of data, as one line or as a mapping."""
    names = (
        "list.json",
        "list.json",
        "*.json",
        "**",
        "[",
        "{0..2}.json",
        ".",
        "~",
        "~nobody/a.json",
        "s.tar",
    )
    names += ("emoji_scenes:size=3", "emoji_scenes:size=9" * 99, "emoji_scenes:size=", ",", "a,b=c")
    lines = [rng.choice((*names, text(rng))) for _ in range(rng.choice((1, 1, 2)))]
    options = ("split=test", "images=.", f"images={text(rng)}", "weight=nan")
    line = ",".join([*lines, *rng.sample(options, rng.choice((0, 0, 1)))])
    mapping = {"files": rng.choice((line, lines)), rng.choice(("split", "images", "x")): text(rng)}
    if rng.random() < 0.3:
        mapping["files"] = hostile(rng)
    return rng.choice((line, line, mapping, [line, mapping], hostile(rng)))


@kind(share=0.5)
def data_specs(folder, rng):
    (folder / "a.png").write_bytes(picture())
    (folder / "list.json").write_text(json.dumps([{"image": "a.png", "caption": "a"}]))
    given = spec(rng)
    try:
        if rng.random() < 0.7:
            source = open_source(given, image_size=16)
        else:
            task = rng.choice(("vqa", "entailment", "nlvr2", "classification"))
            source = open_examples(task, given, image_size=16)
    except (TypeError, ValueError, FileNotFoundError) as error:
        if len(str(error)) > 10_000:
            raise Loss(f"a message of {len(str(error))} characters") from error
        return refused(error, "expected")
    return "reported" if check_source(source, 20).reasons else "read"
