"""The command takes the task that the model and the data leave."""

import numpy as np
import open_clip
import pytest
import timm
from PIL import Image
from rich.console import Console
from timm.models import save_for_hf

import elip_models
from elip_models.calibration.class_names import prompt_templates
from elip_models.commands.calibration_task import Opening, Source, prepare
from tests.helpers.models import OPEN_CLIP_TEXT, OPEN_CLIP_VISION, hf_vision

N = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of small models, images in two class folders, and files about them."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(N):
        pixels = np.random.default_rng(i).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        path = folder / "photos" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        mask = folder / "masks" / path.relative_to(folder / "photos")
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.tile(np.arange(48, dtype=np.uint8) // 24, (48, 1))).save(mask)
    paths = [path.relative_to(folder / "photos") for path in (folder / "photos").rglob("*.png")]
    for name, texts in {"captions": ("a cat", "a dog"), "numbers": ("0", "1")}.items():
        lines = (f"{path.as_posix()},{texts[path.parent.name == 'dog']}" for path in paths)
        (folder / f"{name}.csv").write_text("\n".join(lines))
    for name, classes in {"vit": ["Cat", "dog", "owl"], "other": ["house", "tree", "owl"]}.items():
        model = timm.create_model("test_vit", num_classes=3, img_size=48)
        config = {"label_names": classes, "input_size": [3, 48, 48]}
        save_for_hf(model, folder / name, model_args={"img_size": 48}, model_config=config)
    hf_vision(
        "ViTForImageClassification", "ViTConfig", num_labels=2, id2label={0: "dog", 1: "cat"}
    ).save_pretrained(folder / "hf")
    text = OPEN_CLIP_TEXT | {"vocab_size": 49408, "context_length": 16}
    config = {"embed_dim": 16, "vision_cfg": OPEN_CLIP_VISION, "text_cfg": text}
    pair = elip_models.reduce_(open_clip.CLIP(16, OPEN_CLIP_VISION, text))
    elip_models.save_reduced(pair, folder / "clip", config=config)
    return folder


def prepared(folder, model, task=None, **data):
    spec = model.replace("{}", str(folder))
    fields = dict.fromkeys(("labels", "captions", "masks", "questions")) | data
    options = {
        "count": None,
        "seed": 0,
        "batch_size": 8,
        "answering": {},
        "console": Console(quiet=True),
    }
    return prepare(Opening(spec, True, "cpu"), Source(folder / "photos", **fields), task, **options)


@pytest.mark.filterwarnings("ignore:.* stores no mean and standard deviation")
@pytest.mark.parametrize(
    ("model", "data", "expected"),
    [
        ("timm:local-dir:{}/vit", None, "cosine"),
        ("timm:local-dir:{}/vit", "labels", "head"),
        ("timm:local-dir:{}/other", "labels", "probe"),
        ("timm:local-dir:{}/vit", "numbers", "probe"),
        ("timm:local-dir:{}/vit", "masks", "segmentation-probe"),
        ("hf:{}/hf", "labels", "head"),
        ("hf:{}/hf", "numbers", "head"),
        ("{}/clip", "labels", "zero-shot"),
        ("{}/clip", "numbers", "probe"),
        ("{}/clip", "captions", "retrieval"),
    ],
)
def test_the_task_is_found(model, data, expected, folder):
    sources = {
        "labels": {"labels": "folders"},
        "numbers": {"labels": str(folder / "numbers.csv")},
        "captions": {"captions": folder / "captions.csv"},
        "masks": {"masks": folder / "masks"},
        None: {},
    }
    found = prepared(folder, model, **sources[data])
    assert found.task.name == expected and found.task.count == N
    assert found.names[0].endswith(".png") and not elip_models.is_reduced(found.model)
    if (data, expected) == ("labels", "head"):
        dog = found.task.labels[["dog" in name for name in found.names]]
        assert dog.unique().tolist() == [0 if "hf" in model else 1]
    if expected == "zero-shot":
        assert found.task.texts[0] == [template("cat") for template in prompt_templates()]


@pytest.mark.parametrize(
    ("task", "data", "message"),
    [
        ("retrieval", {}, "--captions: expected one with --task retrieval, got none"),
        ("head", {"masks": "masks"}, "--masks: expected none with --task head, which reads --lab"),
        (
            None,
            {"labels": "folders", "masks": "m"},
            "--masks: expected one of --labels or",
        ),
        (len, {"labels": "folders"}, "--labels: expected none with a function of your own"),
        ("retrieval", {"captions": "captions"}, "--task: expected retrieval with an image-text"),
    ],
)
def test_data_that_the_task_does_not_read_are_named(task, data, message, folder):
    if "captions" in data:
        data = {"captions": folder / "captions.csv"}
    with pytest.raises(ValueError, match=message):
        prepared(folder, "timm:local-dir:{}/vit", task, **data)
