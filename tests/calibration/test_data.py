"""Captions, masks and questions of files; a file that does not fit is refused by its name."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from elip_models.calibration.data import MaskFiles, mask_files, read_captions, read_questions


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    for name in ("a.jpg", "b/c.jpg"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4)).save(images / name)
    return images


def write(folder, name, content):
    file = folder.parent / name
    text = content if isinstance(content, str) else "\n".join(map(json.dumps, content))
    file.write_text(text, encoding="utf-8")
    return file


def mask(folder, name, size=(6, 4), mode="L"):
    file = (folder.parent / "masks" / name).with_suffix(".png")
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 2 if mode == "L" else None).save(file)
    return file


ROWS = [
    {"image": "b/c.jpg", "caption": "one"},
    {"image": "a.jpg", "caption": "two, three"},
    {"image": "b/c.jpg", "caption": "four"},
]


@pytest.mark.parametrize("kind", ["csv", "header", "json", "jsonl"])
def test_captions_of_all_forms_are_the_same(folder, kind):
    lines = 'b/c.jpg,one\na.jpg,"two, three"\nb/c.jpg,four\n'
    content = {"csv": lines, "header": f"image,caption\n{lines}", "json": json.dumps(ROWS)}
    suffix = "csv" if kind == "header" else kind
    file = write(folder, f"captions.{suffix}", content.get(kind, ROWS))
    wanted = {folder / "b/c.jpg": ("one", "four"), folder / "a.jpg": ("two, three",)}
    assert read_captions(file, folder) == wanted


def test_a_list_of_captions_is_several(folder):
    file = write(folder, "captions.json", json.dumps([{"image": "a.jpg", "captions": ["x", "y"]}]))
    assert read_captions(file, folder) == {folder / "a.jpg": ("x", "y")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            [{"image": "z.jpg", "caption": "x"}],
            r"captions: .* 'z.jpg' in row 1 of c.jsonl.*missing",
        ),
        ([ROWS[0], {"image": "a.jpg"}], r"captions: expected a text .* in row 2"),
        ([{"image": "a.jpg", "caption": " "}], "captions: expected a text in each row"),
        ([{"caption": "x"}], "captions: expected the path of an image"),
        ("{", r"captions: expected a readable .jsonl file"),
        ("", "captions: expected rows"),
    ],
)
def test_wrong_captions_are_refused(folder, content, message):
    with pytest.raises(ValueError, match=message):
        read_captions(write(folder, "c.jsonl", content), folder)


def test_a_line_of_three_columns_is_refused(folder):
    with pytest.raises(ValueError, match=r"quotation marks.*two, three"):
        read_captions(write(folder, "c.csv", "a.jpg,two, three\n"), folder)


def test_masks_have_the_names_of_their_images(folder):
    images = [folder / "a.jpg", folder / "b/c.jpg"]
    files = [mask(folder, "a"), mask(folder, "b/c")]
    assert mask_files(images, folder, folder.parent / "masks") == files
    masks = MaskFiles(files, images)
    assert len(masks) == 2 and torch.equal(masks[1], torch.full((4, 6), 2))


def test_masks_and_images_that_do_not_fit_are_refused(folder):
    images, masks = [folder / "a.jpg", folder / "b/c.jpg"], folder.parent / "masks"
    file = mask(folder, "a")
    with pytest.raises(ValueError, match=r"got none for c\.jpg: .*masks/b/c\.png is missing"):
        mask_files(images, folder, masks)
    mask(folder, "b/c")
    extra = mask(folder, "d")
    with pytest.raises(ValueError, match=r"expected an image for each mask, got none for .*d\.png"):
        mask_files(images, folder, masks)
    extra.unlink()
    wrong = mask(folder, "b/c", size=(4, 6))
    with pytest.raises(ValueError, match=r"size of the image, 6 x 4 pixels, got 4 x 6 in .*c\.png"):
        MaskFiles([file, wrong], images)[1]
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(file)
    with pytest.raises(ValueError, match=r"class indices, got RGB in .*a\.png"):
        MaskFiles([file], images)[0]


def test_questions_have_images_and_may_have_answers(folder):
    rows = [
        {"image": ["a.jpg", "b/c.jpg"], "question": "Same?", "answers": ["no", "No."]},
        {"image": "a.jpg", "question": "What?"},
    ]
    first, second = read_questions(write(folder, "q.jsonl", rows), folder)
    assert first.images == (folder / "a.jpg", folder / "b/c.jpg")
    assert first.answers == ("no", "No.") and second.answers == ()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "a.jpg"}, "questions: expected a question in each row.*row 1"),
        ({"question": "What?"}, "questions: expected paths of images"),
        ({"image": "z.jpg", "question": "What?"}, "questions: .*z.jpg.*missing"),
        ({"image": "a.jpg", "question": "What?", "answers": [1]}, "questions: expected texts"),
    ],
)
def test_wrong_questions_are_refused(folder, row, message):
    with pytest.raises(ValueError, match=message):
        read_questions(write(folder, "q.jsonl", [row]), folder)
