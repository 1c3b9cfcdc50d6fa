"""Lists of images and texts: entries of wrong kinds, hostile texts, damaged bytes, bad specs."""

import copy
import json

from elip_models.images import SampleError
from elip_models.pretraining.data import JsonSource, check_source, open_examples, open_source
from elip_models.pretraining.data.derived_sources import group_by_image
from tests.fuzz.harness import Loss, kind, refused
from tests.helpers.damage import damaged, picture

IMAGES = ("a.png", "b.png")
NUMBERS = (0, -1, 0.5, 1e308, float("nan"), float("inf"), 2**31, 2**64, 10**400)
WORDS = ("", " \n", "a\0b", "\ud800", "😀", "\u202e", ".", "/", "/dev/zero", "..", "a.png/b", "~x")
WORDS += ("a" * 256, "b/" * 3000, "long " * 10**5, "a\nb", "nan")
EMPTY = (None, True, False, [], {}, [[]], [None], {"image": "a.png"}, [True])


def hostile(rng):
    """A value of any kind."""
    value = rng.choice((rng.choice(NUMBERS), rng.choice(WORDS), rng.choice(EMPTY)))
    return rng.choice((value, value, [value], [value] * 4, {"caption": value}))


def places(value, path=()):
    """The paths of all values inside of a value."""
    yield path
    inside = {dict: dict.items, list: enumerate}.get(type(value), lambda _: ())
    for key, item in inside(value):
        yield from places(item, (*path, key))


def changed(content, rng):
    """The content with some values replaced, removed, repeated or renamed."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        paths = [path for path in places(content) if path]
        if not paths or rng.random() < 0.02:
            return hostile(rng)
        *path, last = rng.choice(paths)
        holder = content
        for key in path:
            holder = holder[key]
        action = rng.random()
        if action < 0.75:
            holder[last] = rng.choice(WORDS) if isinstance(holder[last], str) else hostile(rng)
        elif action < 0.85:
            del holder[last]
        elif isinstance(holder, dict):
            holder[rng.choice(("boxes", "image_id", "id", *WORDS))] = holder.pop(last)
        else:
            holder.append(holder[last])
    return content


def as_json(content, rng):
    """Bytes of a file: JSON, and some of it too deep, or damaged."""
    written = json.dumps(content, ensure_ascii=rng.random() < 0.7)
    if rng.random() < 0.1:
        written = written.replace('"a.png"', "[" * 10**5, 1)
    written = written.encode(errors="surrogatepass")
    return damaged(written, rng) if rng.random() < 0.2 else written


BOXES = [[[0, 0, 3, 4]], [[1, 1.5, 2, 2], [0, 0, 1, 1]]]
LISTED = [{"image": "a.png", "caption": ["one", "two"], "boxes": BOXES, "image_id": 3}]
LISTED += [{"image": image, "caption": "a text"} for image in IMAGES]
SENTENCES = {"sentences": [{"raw": "one"}, {"raw": "two"}], "filename": "a.png", "filepath": "."}
KARPATHY = {"images": [{**SENTENCES, "split": "test", "imgid": i} for i in range(3)]}
COCO = {
    "images": [{"id": i, "file_name": image} for i, image in enumerate(IMAGES)],
    "annotations": [{"image_id": i % 3, "id": i, "caption": f"text {i}"} for i in range(5)],
}


@kind(share=2)
def lists(folder, rng):
    for image in IMAGES:
        (folder / image).write_bytes(picture())
    content = rng.choice((LISTED, KARPATHY, COCO))
    if rng.random() < 0.95:
        content = changed(content, rng)
    (folder / "list.json").write_bytes(as_json(content, rng))
    try:
        source = JsonSource(folder / "list.json")
    except ValueError as error:
        return refused(error, "list.json")
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
    if read + len(report.reasons) != len(source):
        raise Loss(f"{read} read and {len(report.reasons)} reported of {len(source)}")
    check_source(group_by_image(source))
    report.summary().encode()
    return "reported" if report.reasons else "read"


QUESTIONS = [{"question_id": i, "image_id": 1, "question": "What?"} for i in range(3)]
YES = {"multiple_choice_answer": "yes", "answers": [{"answer": "yes"}] * 3}
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
    "grounding": [{"image": "a.png", "text": "a dog", "box": [0, 0, 2, 2], "proposals": []}] * 2,
}


@kind()
def task_lists(folder, rng):
    """One file of a task is hostile."""
    for image in IMAGES:
        (folder / image).write_bytes(picture())
    task = rng.choice(sorted(TASKS))
    contents = [TASKS[task]]
    if task == "vqa" and rng.random() < 0.5:
        contents = [{"questions": QUESTIONS, "data_subtype": "val2014"}]
        contents += [{"annotations": [{"question_id": i, **YES} for i in range(3)]}]
    paths = [folder / f"{i}_list.json" for i in range(len(contents))]
    wrong = rng.randrange(len(contents))
    for i, content in enumerate(contents):
        content = changed(content, rng) if i == wrong and rng.random() < 0.9 else content
        is_lines = isinstance(content, list) and rng.random() < 0.3
        parts = content if is_lines else [content]
        paths[i].write_bytes(b"\n".join(as_json(part, rng) for part in parts))
    options = {"images": str(folder)}
    if task == "vqa":
        (folder / "answer_list.json").write_text('["yes", "no"]')
        options["answers"] = str(folder / "answer_list.json")
    try:
        source = open_examples(task, {"files": [*map(str, paths)], **options}, image_size=16)
    except ValueError as error:
        return refused(error, "list.json")
    report = check_source(source)
    examples = [source.text_alone(index) for index in range(len(source))]
    if report.seen != len(examples) or not all(isinstance(each.text, str) for each in examples):
        raise Loss(f"{report.seen} of {len(examples)} examples")
    report.summary().encode()
    return "reported" if report.reasons else "read"


FILES = ("list.json", "*.json", "**", "[", "{0..2}.json", ".", "~", "~nobody/a.json", "s.tar", ",")
FILES += ("emoji_scenes:size=3", "emoji_scenes:size=", "emoji_scenes:size=9" * 99, "a,b=c")


@kind(share=0.5)
def data_specs(folder, rng):
    """A specification of data, as one line or as a mapping."""
    (folder / "a.png").write_bytes(picture())
    (folder / "list.json").write_text(json.dumps([{"image": "a.png", "caption": "a"}]))
    name = rng.choice((*FILES, *WORDS))
    option = rng.choice(("split=test", "images=.", f"images={rng.choice(WORDS)}", "weight=nan"))
    mapping = {"files": rng.choice((name, [name], hostile(rng))), "images": rng.choice(WORDS)}
    line = rng.choice((name, f"{name},{option}"))
    spec = rng.choice((line, line, mapping, [line, mapping], hostile(rng)))
    try:
        if rng.random() < 0.7:
            source = open_source(spec, image_size=16)
        else:
            task = rng.choice((*TASKS, "classification"))
            source = open_examples(task, spec, image_size=16)
    except (TypeError, ValueError, FileNotFoundError) as error:
        if len(str(error)) > 10_000:
            raise Loss(f"a message of {len(str(error))} characters") from error
        return refused(error)
    return "reported" if check_source(source, 20).reasons else "read"
