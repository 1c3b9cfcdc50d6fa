"""At keep 1, each kind of model gives for files what its own library gives with its own processor.

LLaVA and Qwen2.5-VL are in `test_answers.py`.
"""

import json

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from tokenizers import Tokenizer, models

import elip_models
from elip_models.calibration.class_names import prompt_templates
from elip_models.commands.calibration_task import Opening, Source, prepare
from tests.calibration.test_segmentation import beit
from tests.helpers.models import (
    HF,
    HF_TEXT,
    OPEN_CLIP_TEXT,
    OPEN_CLIP_VISION,
    WIDTH,
    dinov2,
    enlarged,
    hf_vision,
)

N, NAMES = 20, ["cat", "dog"]
SIDE = {"height": 48, "width": 48}


def saved_by_timm(folder, name, **options):
    model = enlarged(timm.create_model(name, img_size=56, depth=2, **options)).eval()
    config = {"label_names": NAMES, "input_size": [3, 56, 56]}
    save_for_hf(model, folder, model_args={"img_size": 56, "depth": 2}, model_config=config)
    transform = create_transform(
        **resolve_data_config({}, model=model) | {"input_size": (3, 56, 56)}
    )
    return lambda images: model(torch.stack([transform(image) for image in images]))


def timm_classifier(folder):
    return saved_by_timm(folder, "vit_tiny_patch16_224", patch_size=8, num_classes=2)


def timm_dinov2(folder):
    return saved_by_timm(folder, "vit_small_patch14_dinov2", num_classes=0)


def transformers_classifier(folder):
    model = hf_vision("ViTForImageClassification", "ViTConfig", id2label=dict(enumerate(NAMES)))
    return saved_by_transformers(folder, model, transformers.ViTImageProcessor(size=SIDE), "logits")


def transformers_classifier_without_head(folder):
    """Its pooler has no weights, and so the class token is the feature."""
    transformers_classifier(folder)
    model = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    return lambda images: model(**processor(images, return_tensors="pt")).last_hidden_state[:, 0]


def transformers_dinov2(folder):
    processor = transformers.BitImageProcessor(size={"shortest_edge": 56}, crop_size=SIDE)
    return saved_by_transformers(folder, dinov2(), processor, "pooler_output")


def segmenter(folder):
    processor = transformers.BeitImageProcessor(size=SIDE, do_center_crop=False)
    return saved_by_transformers(folder, enlarged(beit()), processor, "logits")


def saved_by_transformers(folder, model, processor, name):
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return lambda images: model(**processor(images, return_tensors="pt"))[name]


def open_clip_clip(folder):
    text = OPEN_CLIP_TEXT | {"vocab_size": 49408, "context_length": 16}
    config = {"embed_dim": 16, "vision_cfg": OPEN_CLIP_VISION, "text_cfg": text}
    pair = enlarged(open_clip.CLIP(16, OPEN_CLIP_VISION, text))
    folder.mkdir()
    content = {"model_cfg": config, "preprocess_cfg": {"mean": [0.4] * 3, "std": [0.3] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    save_file(pair.state_dict(), folder / "open_clip_model.safetensors")
    name = f"local-dir:{folder}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()

    def own(images, texts=None):
        if texts is None:
            options = NAMES, prompt_templates()
            classes = open_clip.build_zero_shot_classifier(model, tokenizer, *options)
        else:
            classes = F.normalize(model.encode_text(tokenizer(texts)), dim=-1).T
        features = model.encode_image(torch.stack([transform(image) for image in images]))
        return F.normalize(features, dim=-1) @ classes

    return own


def siglip(folder):
    letters = {letter: i for i, letter in enumerate("_$?abcdefghijklmnopqrstuvwxyz .,'")}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="?")),
        pad_token="_",
        eos_token="$",
        unk_token="?",
        model_max_length=16,
        model_input_names=["input_ids"],  # as those of SigLIP, which pads without a mask
    )
    text = HF_TEXT | {"max_position_embeddings": 16, "projection_size": WIDTH}
    text |= {"bos_token_id": 1, "eos_token_id": 1}
    config = transformers.SiglipConfig(text_config=text, vision_config=HF)
    model = enlarged(transformers.SiglipModel(config)).eval()
    images_of = transformers.SiglipImageProcessor(size=SIDE)
    processor = transformers.SiglipProcessor(image_processor=images_of, tokenizer=tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    options = {"padding": "max_length", "max_length": 16, "truncation": True}

    def own(images, classes=None):
        if classes is None:
            texts = [[template(name) for template in prompt_templates()] for name in NAMES]
            classes = torch.stack([embedded(of_class).mean(0) for of_class in texts])
        else:
            classes = embedded(classes)
        pixels = processor(images=images, return_tensors="pt")
        features = F.normalize(model.get_image_features(**pixels).pooler_output, dim=-1)
        return features @ F.normalize(classes, dim=-1).T

    def embedded(texts):
        ids = processor(text=texts, **options, return_tensors="pt")
        return F.normalize(model.get_text_features(**ids).pooler_output, dim=-1)

    return own


CASES = {
    timm_classifier: ("timm:local-dir:", "head"),
    timm_dinov2: ("timm:local-dir:", "probe"),
    transformers_classifier: ("hf:", "head"),
    transformers_classifier_without_head: ("hf:", "probe"),
    transformers_dinov2: ("hf:", "probe"),
    segmenter: ("hf:", "segmentation"),
    open_clip_clip: ("open_clip:local-dir:", "zero-shot"),
    siglip: ("hf:", "zero-shot"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for i in range(N):
        name, side = f"{NAMES[i % 2]}/{i:02}.png", (48, 48)
        for kind, shape in {"photos": (60, 52, 3), "squares": (*side, 3), "masks": side}.items():
            path = folder / kind / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256 if len(shape) == 3 else 2, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
@torch.no_grad()
def test_the_dense_outputs_are_those_of_the_library(make, data, tmp_path):
    torch.manual_seed(0)
    own = make(tmp_path / "model")
    spec, name = CASES[make]
    is_segmenter = name == "segmentation"
    photos = data / ("squares" if is_segmenter else "photos")
    labels, masks = (None, data / "masks") if is_segmenter else ("folders", None)
    source = Source(photos, labels, None, masks, None)
    _, got, images = reduced_by_nothing(f"{spec}{tmp_path / 'model'}", source, name)
    torch.testing.assert_close(got, own(images), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("make", [open_clip_clip, siglip], ids=lambda make: make.__name__)
@torch.no_grad()
def test_captions_are_compared_with_images_as_the_library_does(make, data, tmp_path):
    torch.manual_seed(0)
    own = make(tmp_path / "model")
    captions, photos = tmp_path / "captions.csv", data / "photos"
    names = [path.relative_to(photos).as_posix() for path in sorted(photos.rglob("*.png"))]
    captions.write_text("\n".join(f"{name},the {name[:3]} of {i}" for i, name in enumerate(names)))
    source = Source(photos, None, captions, None, None)
    spec = f"{CASES[make][0]}{tmp_path / 'model'}"
    task, got, images = reduced_by_nothing(spec, source, "retrieval")
    expected = own(images, [f"the {name[:3]} of {i}" for i, name in enumerate(names)])
    torch.testing.assert_close(got @ task.of_texts.T, expected, rtol=1e-4, atol=1e-4)


def reduced_by_nothing(spec, source, name):
    """Return the task that the command makes of files, what its model returns, and the files."""
    prepared = prepare(
        Opening(spec, True, "cpu"),
        source,
        name,
        count=None,
        seed=0,
        batch_size=8,
        answering={},
        console=Console(quiet=True),
    )
    task = prepared.task
    images = [Image.open(source.images / file).convert("RGB") for file in prepared.names]
    reduced = elip_models.reduce_(prepared.model, "merge", keep=1.0)
    return task, task.forward(reduced, task.pixels(reduced, range(N))), images
