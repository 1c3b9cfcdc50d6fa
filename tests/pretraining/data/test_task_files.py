"""Data files of the tasks: every format, and the errors for malformed files."""

import json
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature

from elip_models.analysis.answer_scores import vqa_accuracy
from elip_models.images import SampleError
from elip_models.pretraining.data import (
    check_source,
    open_classes,
    open_examples,
    open_source,
    soft_scores,
)
from tests.helpers.task_files import draw, write


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def opened(task, spec):
    return open_examples(task, spec, image_size=16)


def with_answers(*texts: str) -> dict:
    answers = [{"answer": text, "answer_id": i} for i, text in enumerate(texts)]
    return {"question_id": 7, "multiple_choice_answer": texts[0], "answers": answers}


QUESTION = {"question_id": 7, "image_id": 42, "question": "Is it  red?"}
SNLI = {"Flickr30K_ID": "7", "sentence2": "it is red", "gold_label": "neutral", "pairID": "7#0r1"}
NLVR2 = {"identifier": "dev-3-1-0", "sentence": "both are red", "label": "True"}


def vqa_files(folder: Path, *annotations: dict, question=QUESTION, subset="val2014") -> str:
    questions = {"questions": [question], "data_subtype": subset}
    files = [write(folder / "questions.json", questions)]
    if annotations:
        files.append(write(folder / "annotations.json", {"annotations": list(annotations)}))
    write(folder / "list.json", ["no", "yes"])
    return ",".join(map(str, files)) + f",answers={folder / 'list.json'}"


@pytest.mark.parametrize("image", ["val2014/COCO_val2014_{}.jpg", "COCO_val2014_{}.png"])
def test_vqa_v2_of_questions_and_annotations(image, tmp_path):
    draw(tmp_path / "coco" / image.format("000000000042"))
    spec = vqa_files(tmp_path, with_answers(*["yes"] * 6, *["no"] * 3, "dark red"))
    source = opened("vqa", f"{spec},images={tmp_path / 'coco'}")
    assert source.answers == ("no", "yes")
    (image,), text, answers, question_id = source[0]
    assert (image.size, text, question_id) == ((6, 5), "Is it  red?", "7")
    assert answers == {"yes": 0.6, "no": 0.3, "dark red": 0.1}
    assert soft_scores(answers) == {"yes": 1.0, "no": 0.9, "dark red": 0.3}
    assert source.text_alone(0) == source[0]._replace(images=())


def test_vqa_lists_have_ten_answers_or_one_with_the_weight_of_the_spec(tmp_path):
    draw(tmp_path / "coco" / "a.jpg")
    ten = {"image": "a.jpg", "question": "why?", "question_id": 3, "answer": ["x"] * 8 + ["y"] * 2}
    one = {"image": "a.jpg", "question": "who?", "dataset": "vg", "answer": "z"}
    first, second = write(tmp_path / "vqa.json", [ten]), write(tmp_path / "vg.json", [one] * 9)
    images, answers = tmp_path / "coco", write(tmp_path / "list.json", ["x"])
    line = f"{first},images={images},answers={answers}"
    mapping = {"files": str(second), "images": str(images), "weight": 0.5}
    source = opened("vqa", [line, mapping])
    assert len(source) == 10
    assert source.answers == ("x", "z")
    assert source[0].answers == {"x": 0.8, "y": 0.2}
    assert source[1].answers == {"z": 0.5}


def test_an_answer_list_from_the_data_has_frequent_first_answers(tmp_path):
    entries = [{"image": "a", "question": "?", "answer": [a, a, "b"]} for a in "x" * 9 + "y" * 8]
    source = opened("vqa", str(write(tmp_path / "vqa.json", entries)))
    assert source.answers == ("x",)
    few = write(tmp_path / "few.json", entries[:8])
    with pytest.raises(ValueError, match=r"answers: expected a file, .* first of 9"):
        opened("vqa", str(few))


def test_the_list_of_answers_is_normalised_but_people_are_compared_as_they_wrote(tmp_path):
    said = with_answers(*["Two dogs."] * 4, *["2 dogs"] * 3, *["the"] * 3)
    questions = [QUESTION | {"question_id": i, "image_id": i // 3} for i in range(9)]
    content = {"questions": questions, "data_subtype": "val2014"}
    annotations = {"annotations": [said | {"question_id": i} for i in range(9)]}
    files = write(tmp_path / "q.json", content), write(tmp_path / "a.json", annotations)
    source = opened("vqa", ",".join(map(str, files)))
    assert source.answers == ("2 dogs",)
    people = source.text_alone(0).answers
    assert people == {"Two dogs.": 0.4, "2 dogs": 0.3, "the": 0.3}
    assert vqa_accuracy(people, "2 dogs") == 0.9
    assert [source.image_number(i) for i in range(9)] == [0, 0, 0, 3, 3, 3, 6, 6, 6]


@pytest.mark.parametrize(
    ("content", "example_id"),
    [
        ((SNLI,), "7#0r1"),
        (({"Flikr30kID": "7.jpg", **{k: v for k, v in SNLI.items() if k[0] != "F"}},), "7#0r1"),
        ([{"image": "7", "sentence": "it is red", "label": "neutral"}], "0"),
    ],
)
def test_snli_ve(content, example_id, tmp_path):
    draw(tmp_path / "flickr" / "7.jpg")
    path = write(tmp_path / "ve.jsonl", content)
    source = opened("entailment", f"{path},images={tmp_path / 'flickr'}")
    assert source.answers == ("entailment", "neutral", "contradiction")
    assert source[0].images[0].size == (6, 5)
    assert source[0][1:] == ("it is red", {"neutral": 1.0}, example_id)


@pytest.mark.parametrize(
    ("content", "images"),
    [
        ((NLVR2,), ("dev-3-1-img0.png", "dev-3-1-img1.png")),
        (({**NLVR2, "directory": 9},), ("9/dev-3-1-img0.png", "9/dev-3-1-img1.png")),
        (
            [{"images": ["dev/l.png", "dev/r.png"], "sentence": "both are red", "label": "True"}],
            ("dev/l.png", "dev/r.png"),
        ),
    ],
)
def test_nlvr2(content, images, tmp_path):
    for image, colour in zip(images, ("red", "blue"), strict=True):
        draw(tmp_path / "nlvr2" / image, colour)
    path = write(tmp_path / "dev.json", content)
    source = opened("nlvr2", f"{path},images={tmp_path / 'nlvr2'}")
    assert source.answers == ("false", "true")
    left, right = source[0].images
    assert (left.getpixel((0, 0)), right.getpixel((0, 0))) == ((255, 0, 0), (0, 0, 255))
    assert source[0][1:3] == ("both are red", {"true": 1.0})


def test_karpathy_files_by_split(tmp_path):
    entries = [
        {"filename": f"{split}.jpg", "filepath": folder, "split": split, "cocoid": number}
        | {"sentences": [{"raw": f"a {split}  picture"}, {"raw": "two"}], "imgid": 9}
        for number, (split, folder) in enumerate(
            [("train", "train2014"), ("restval", "val2014"), ("test", "val2014")]
        )
    ]
    path = write(tmp_path / "dataset_coco.json", {"images": entries, "dataset": "coco"})
    draw(tmp_path / "coco" / "val2014" / "test.jpg")
    source = open_source(f"{path},images={tmp_path / 'coco'},split=test", image_size=16)
    assert [(sample.captions, sample.id) for sample in source] == [(("a test picture", "two"), "2")]
    both = {"files": [str(path)], "split": "train+restval"}
    assert len(open_source(both, image_size=16)) == 2
    assert len(open_source(str(path), image_size=16)) == 3
    with pytest.raises(ValueError, match="split: expected restval or test or train, got val"):
        open_source(f"{path},split=val", image_size=16)


def test_captions_of_coco(tmp_path):
    content = {
        "images": [{"id": 5, "file_name": "a.jpg"}, {"id": 6, "file_name": "b.jpg"}],
        "annotations": [{"image_id": 5, "id": n, "caption": f"{n}"} for n in range(2)],
    }
    draw(tmp_path / "a.jpg")
    path = write(tmp_path / "captions_val2014.json", content)
    source = open_source(str(path), image_size=16)
    assert (source[0].captions, source[0].id) == (("0", "1"), "5")
    with pytest.raises(SampleError, match=r"captions_val2014\.json\[1\] b\.jpg: no caption"):
        source[1]
    with pytest.raises(ValueError, match="split: expected none, since the files have none"):
        open_source(f"{path},split=test", image_size=16)
    content["annotations"] += [{"image_id": n, "caption": "a"} for n in (7, 7, 8)]
    with pytest.warns(UserWarning, match="left out 3 captions of 2 images that it does not list"):
        assert open_source(str(write(path, content)), image_size=16).captions(0) == ("0", "1")


def test_boxes_mark_what_a_caption_names(tmp_path):
    draw(tmp_path / "a.jpg")
    entry = {"image": "a.jpg", "caption": ["one", "two"], "boxes": [[[1, 2.4, 2, 9]], []]}
    source = open_source(str(write(tmp_path / "list.json", [entry])), image_size=16)
    mask = source.named_mask(0, 0)
    assert mask.shape == (5, 6) and mask[2:, 1:3].all() and mask.sum() == 6
    assert not source.named_mask(0, 1).any()


def cifar(folder: Path) -> str:
    """Write parquet files in the form of CIFAR-100 on the hub."""
    image = {"bytes": draw(folder / "a.png").read_bytes(), "path": None}
    broken = {"bytes": b"no image", "path": None}
    fine, coarse = ClassLabel(names=["apple", "bear_cub"]), ClassLabel(names=["fruit", "mammals"])
    rows = {"img": [image, None, broken], "fine_label": [1, 0, 0], "coarse_label": [1, 0, 0]}
    features = Features({"img": ImageFeature(), "fine_label": fine, "coarse_label": coarse})
    (folder / "cifar").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(folder / "cifar" / "test-0.parquet")
    return f"datasets:{folder / 'cifar'}"


def test_cifar_of_parquet_files(tmp_path):
    spec = cifar(tmp_path)
    source = open_classes(f"{spec},split=test,label=fine_label", image_size=16)
    assert (source.classes, source.names) == (("apple", "bear_cub"), ("apple", "bear cub"))
    assert (source[0].captions, source[0].image.size) == (("bear_cub",), (6, 5))
    reasons = dict(check_source(source).reasons)
    assert reasons.pop("cifar-test-1") == "no image"
    assert reasons.keys() == {"cifar-test-2"}
    examples = opened("classification", f"{spec},split=test,label=coarse_label")
    assert examples.text_alone(0)[1:] == ("", {"mammals": 1.0}, "cifar-test-0")
    for wrong, message in {
        f"{spec},split=test": "expected one column of ClassLabel, got .*; add label=NAME",
        f"{spec},split=test,label=img": "expected one column of ClassLabel named 'img', got",
        f"{spec},split=val": "val",
        f"{spec}": r"spec: expected .*datasets:NAME_OR_FOLDER,split=test.*, got",
        f"{spec},split=test,images=x": "expected the options split, label, names, got 'images'",
    }.items():
        with pytest.raises(ValueError, match=message):
            open_classes(wrong, image_size=16)


@pytest.mark.parametrize("label", [-1, None])
def test_a_split_without_classes_is_refused(label, tmp_path):
    image = {"bytes": draw(tmp_path / "a.png").read_bytes(), "path": None}
    features = Features({"img": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
    (tmp_path / "hub").mkdir()
    table = Dataset.from_dict({"img": [image, None], "label": [0, label]}, features=features)
    table.to_parquet(tmp_path / "hub" / "test-0.parquet")
    with pytest.raises(ValueError, match=r"images all have a class, got 1 of 2 without .* hub"):
        open_classes(f"datasets:{tmp_path / 'hub'},split=test", image_size=16)


BROKEN = {
    "no subset": ("vqa", {"questions": []}, r"q\.json\[data_subtype\]: .*, got None"),
    "half a line": ("nlvr2", json.dumps(NLVR2) + '\n{"b"', r"q\.json: .*, got no valid JSON"),
    "a label": (
        "entailment",
        ({**SNLI, "gold_label": "-"},),
        r"q\.json\[0\]: label: expected one of entailment, neutral, contradiction, got -",
    ),
    "no label": ("entailment", [{"image": "a", "sentence": "b"}], r"q\.json\[0\]: label: .* none"),
    "one image": (
        "nlvr2",
        [{"images": ["a"], "sentence": "b", "label": "True"}],
        r"q\.json\[0\]: expected 2 image paths, got \['a'\]",
    ),
    "no entry": ("nlvr2", [], "spec: expected at least one sample, got none in"),
}


@pytest.mark.parametrize(("task", "content", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_one_line_with_the_place_and_the_value(task, content, message, tmp_path):
    path = tmp_path / "q.json"
    path.write_text(content) if isinstance(content, str) else write(path, content)
    with pytest.raises(ValueError, match=message) as caught:
        opened(task, str(path))
    assert "\n" not in str(caught.value)
