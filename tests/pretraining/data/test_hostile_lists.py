"""Lists with entries of wrong kinds, or that contradict each other: an error, or a counted loss."""

import sys

import pytest

from elip_models.images import SampleError
from elip_models.pretraining.data import JsonSource, check_source, open_source
from elip_models.pretraining.data.json_files import read_json
from tests.pretraining.data.test_task_files import draw, opened, write

NAN, INF = float("nan"), float("inf")


def test_captions_of_absent_images_are_counted(tmp_path):
    content = {
        "images": [{"id": 5, "file_name": "a.jpg"}],
        "annotations": [{"image_id": n, "caption": "a"} for n in (5, 7, 7, 8)],
    }
    draw(tmp_path / "a.jpg")
    source = JsonSource(write(tmp_path / "coco.json", content))
    assert source[0].captions == ("a",)
    report = check_source(source)
    assert report.seen - len(report.reasons) == 1
    lost = "the file has {} captions of this image, and no entry of it in images"
    assert report.reasons == [
        ("coco.json[1] id 7", lost.format(2)),
        ("coco.json[2] id 8", lost.format(1)),
    ]
    assert len({source.image_number(index) for index in range(3)}) == 3


def test_two_images_of_one_id_are_refused(tmp_path):
    images = [{"id": 5, "file_name": name} for name in ("a.jpg", "b.jpg")]
    path = write(tmp_path / "coco.json", {"images": images, "annotations": []})
    with pytest.raises(ValueError, match=r"\[images\]\[1\]: id: expected another one .*, got 5"):
        JsonSource(path)


def test_a_key_given_twice_is_refused(tmp_path):
    path = tmp_path / "list.json"
    path.write_text('[{"image": "a.png", "caption": "one", "caption": "two"}]')
    with pytest.raises(ValueError, match=r"list\.json: .* an object has the key 'caption' twice"):
        JsonSource(path)
    path.write_text('{"label": 1, "label": 2}\n')
    with pytest.raises(ValueError, match=r"list\.json\[0\]: .* the key 'label' twice"):
        opened("entailment", str(path))


def test_a_key_given_twice_is_found_in_linear_time(tmp_path):
    keys = [*range(200_000), 199_999]
    pairs = ",".join(f'"k{key}": 1' for key in keys)
    (tmp_path / "list.json").write_text(f"{{{pairs}}}")
    with pytest.raises(ValueError, match=r"list\.json: .* an object has the key 'k199999' twice"):
        JsonSource(tmp_path / "list.json")


@pytest.mark.parametrize("number", [NAN, INF, -INF, 1e400, 2**25, 10**400, "1", True, None, [1]])
def test_boxes_that_are_no_pixels_are_refused(number, tmp_path):
    entry = {"image": "a.png", "caption": "a", "boxes": [[[0, number, 1, 1]]]}
    with pytest.raises(ValueError, match=r"list\.json\[0\]: boxes: expected a list for each of 1"):
        JsonSource(write(tmp_path / "list.json", [entry]))


@pytest.mark.parametrize("image_id", [[], {}, True, [[[["a"]]]]])
@pytest.mark.parametrize("kind", ["list", "karpathy"])
def test_an_id_of_another_type_is_refused(image_id, kind, tmp_path):
    content = [{"image": "a.png", "caption": "a", "image_id": image_id}]
    if kind == "karpathy":
        entry = {"filename": "a.png", "split": "test", "sentences": [], "imgid": image_id}
        content = {"images": [entry]}
    with pytest.raises(ValueError, match=r"im.*id: expected a string or a number, got"):
        JsonSource(write(tmp_path / "list.json", content))


def test_a_missing_id_is_the_path(tmp_path):
    draw(tmp_path / "a.png")
    entry = {"image": "a.png", "caption": "a", "image_id": None}
    assert JsonSource(write(tmp_path / "list.json", [entry]))[0].id == "a.png"


@pytest.mark.parametrize("folder", [3, None, ["a"]])
def test_a_folder_of_another_type_is_refused(folder, tmp_path):
    entry = {"filename": "a.png", "split": "test", "sentences": [], "filepath": folder}
    with pytest.raises(ValueError, match=r"\[images\]\[0\]: filepath: expected a string, got"):
        JsonSource(write(tmp_path / "list.json", {"images": [entry]}))


@pytest.mark.parametrize("depth", [900, 960, 985, 100_000])
@pytest.mark.parametrize("around", ["%s", '[{"image": "a", "caption": %s}]', '{"images": %s}'])
def test_deep_json_is_refused(depth, around, tmp_path):
    path = tmp_path / "list.json"
    path.write_text(around % ("[" * depth + "]" * depth))
    with pytest.raises(ValueError, match=r"list\.json"):
        JsonSource(path)


def test_a_long_value_is_shortened_in_the_error(tmp_path):
    path = write(tmp_path / "list.json", [{"image": list(range(10**6)), "caption": "a"}])
    with pytest.raises(ValueError, match="image: expected a string, got") as caught:
        JsonSource(path)
    assert len(str(caught.value)) < 500 + len(str(path))


def test_a_list_in_a_folder_that_is_not_utf8_is_read(tmp_path):
    folder = tmp_path / "n\udcffo"
    draw(folder / "a.png")
    source = JsonSource(write(folder / "list.json", [{"image": "a.png", "caption": "a"}]))
    assert source[0].captions == ("a",)


@pytest.mark.parametrize("name", ["a" * 300 + ".json", "a" * 300, "a\0.json", "~" + "a" * 300])
def test_a_path_that_cannot_be_is_not_found(name):
    with pytest.raises((FileNotFoundError, ValueError), match=r"spec: expected|~ or the ~name"):
        open_source(name, image_size=8)
    with pytest.raises(FileNotFoundError, match="paths: expected an existing file"):
        JsonSource(name)


def test_an_invalid_integer_is_no_valid_json(tmp_path):
    path = tmp_path / "list.json"
    path.write_text("[" + "9" * (sys.get_int_max_str_digits() + 1) + "]")
    with pytest.raises(ValueError, match=r"list\.json: expected a list, got no valid JSON"):
        read_json(path, "a list")


@pytest.mark.parametrize("field", ["image", "sentence"])
def test_invalid_unicode_in_the_list_of_a_task_is_named(field, tmp_path):
    entry = {"image": "a.png", "sentence": "it is red", "label": "neutral", field: "a\ud800"}
    with pytest.raises(ValueError, match=r"list\.json\[0\]: text: expected Unicode text, got"):
        opened("entailment", str(write(tmp_path / "list.json", [entry])))


@pytest.mark.parametrize("content", [3, {"data": []}])
def test_questions_of_another_kind_are_refused(content, tmp_path):
    with pytest.raises(ValueError, match=r"vqa\.json: expected VQA v2's"):
        opened("vqa", str(write(tmp_path / "vqa.json", content)))


def test_an_image_that_is_the_root_folder_loses_one_example(tmp_path):
    entry = {"image": "/", "sentence": "it is red", "label": "neutral"}
    source = opened("entailment", str(write(tmp_path / "list.json", [entry])))
    with pytest.raises(SampleError, match=r"list\.json\[0\]"):
        source[0]
