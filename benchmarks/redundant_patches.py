"""The cost of documents and screens without patches that repeat others, by `dedup`.

    python -m benchmarks.redundant_patches           # writes benchmarks/results/vlm/dedup.json

Pillow draws a page of text, a slide, a table and a screen, and stores each as JPEG. A Qwen2.5-VL of
random weights reads them, as is and reduced, one after the other in each round.
"""

import argparse
import copy
import io
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F

import elip_models
from benchmarks.cases import DEVICE
from benchmarks.machine import provenance
from benchmarks.parity import check_errors, relative_error
from elip_models.profiling.measure import (
    milliseconds,
    ratios_to,
    time_side_by_side,
)

RESULT = Path(__file__).parent / "results" / "vlm" / "dedup.json"
TOLERANCES = (0.0, 0.1, 0.4)
DENSE, QUALITY, TEXT_TOKENS = "dense", 90, 48
PORTRAIT, LANDSCAPE = (728, 1036), (1036, 728)  # pixels, in units of 28
WORDS = ("an", "answer", "background", "between", "image", "lines", "of", "page", "patches", "the")


def text_page(seed: int = 0) -> Image.Image:
    """Draw a title, headings and paragraphs over the whole page."""
    page = Image.new("RGB", PORTRAIT, "white")
    draw, choose = ImageDraw.Draw(page), random.Random(seed)
    draw.text((72, 64), "A report on tokens of images", "black", ImageFont.load_default(30))
    for line in range(34):
        top = 132 + 24 * line
        if line % 12 == 0:
            draw.text((72, top), f"{line // 12 + 1}  Heading", "black", ImageFont.load_default(20))
        elif line % 12 != 1:
            text = " ".join(choose.choices(WORDS, k=18))
            draw.text((72, top), text[:84], "black", ImageFont.load_default(15))
    return page


def slide() -> Image.Image:
    """Draw a title, bullet points and a bar chart on a coloured background."""
    page = Image.new("RGB", LANDSCAPE, (24, 36, 72))
    draw = ImageDraw.Draw(page)
    draw.text((64, 56), "Fewer tokens, same answer", "white", ImageFont.load_default(48))
    draw.rectangle((64, 128, 972, 132), fill=(240, 160, 32))
    for i, text in enumerate(("Most patches are background", "They repeat", "They cost time")):
        draw.text((80, 184 + 72 * i), f"-  {text}", "white", ImageFont.load_default(30))
    for i, height in enumerate((90, 150, 210, 260)):
        left = 616 + 88 * i
        draw.rectangle((left, 640 - height, left + 56, 640), fill=(96, 176, 240))
        draw.text((left + 8, 652), f"Q{i + 1}", "white", ImageFont.load_default(24))
    return page


def table() -> Image.Image:
    """Draw a grid of numbers with a header and shaded rows."""
    page = Image.new("RGB", PORTRAIT, "white")
    draw, choose, font = ImageDraw.Draw(page), random.Random(0), ImageFont.load_default(15)
    for row in range(30):
        top = 64 + 30 * row
        shade = (208, 220, 240) if row == 0 else (244, 244, 244) if row % 2 else "white"
        draw.rectangle((40, top, 688, top + 30), fill=shade, outline=(150, 150, 150))
        for column in range(6):
            left = 40 + 108 * column
            draw.line((left, top, left, top + 30), (150, 150, 150))
            text = f"Column {column + 1}" if row == 0 else f"{choose.uniform(0, 9999):,.2f}"
            draw.text((left + 12, top + 6), text, "black", font)
    return page


def screen() -> Image.Image:
    """Draw the window of an editor with a side bar, a few lines of code and a terminal."""
    page = Image.new("RGB", LANDSCAPE, (30, 30, 30))
    draw, choose, font = ImageDraw.Draw(page), random.Random(0), ImageFont.load_default(15)
    draw.rectangle((0, 0, 1036, 28), fill=(60, 60, 60))
    draw.text((16, 5), "File  Edit  View  Run  Help", (220, 220, 220), font)
    draw.rectangle((0, 28, 196, 728), fill=(37, 37, 38))
    for i in range(8):
        draw.text((24, 48 + 28 * i), f"module_{i}.py", (200, 200, 200), font)
    for i in range(14):
        code = " " * choose.choice((0, 4, 8)) + " = ".join(choose.sample(WORDS, 2)) + "()"
        draw.text((224, 48 + 24 * i), f"{i + 1:>2}  {code}", (156, 220, 254), font)
    draw.rectangle((196, 560, 1036, 562), fill=(80, 80, 80))
    draw.text((212, 580), "$ python module_0.py", (204, 204, 204), font)
    return page


DOCUMENTS: dict[str, Callable[[], Image.Image]] = {
    "text page": text_page,
    "slide": slide,
    "table": table,
    "screen": screen,
}


def qwen(smallest: bool) -> nn.Module:
    """Return a Qwen2.5-VL with random weights, so large that patches attend unequally."""
    depth, width = (2, 64) if smallest else (8, 512)
    vision = {"depth": depth, "hidden_size": width // 2, "intermediate_size": width}
    vision |= {"num_heads": 8, "out_hidden_size": width, "window_size": 112, "patch_size": 14}
    text = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2 * depth}
    text |= {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 1000}
    rope = {"rope_type": "default", "mrope_section": [width // 64, width // 32, width // 64]}
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision | {"fullatt_block_indexes": [depth // 2 - 1, depth - 1]},
        text_config=text | {"rope_parameters": rope | {"rope_theta": 1e6}},
        image_token_id=3,
        video_token_id=4,
        vision_start_token_id=5,
        vision_end_token_id=6,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).to(DEVICE).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    return model


def prompt_of(image: Image.Image) -> dict[str, Tensor]:
    """Return the image and a text behind it."""
    processor = transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=4096 * 28 * 28)
    pixels = dict(processor(images=image, return_tensors="pt"))
    count = int(pixels["image_grid_thw"].prod()) // 4
    ids = torch.randint(7, 1000, (1, 1 + count + TEXT_TOKENS))
    ids[:, 0], ids[:, 1 : 1 + count] = 5, 3
    types = (ids == 3).int()
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
    return {name: value.to(DEVICE) for name, value in (prompt | pixels).items()}


@torch.inference_mode()
def prefill(model: nn.Module, prompt: dict[str, Tensor]) -> Tensor:
    """Return the logits of the last token."""
    return model(**prompt, use_cache=True, logits_to_keep=1).logits


@torch.inference_mode()
def features(model: nn.Module, prompt: dict[str, Tensor]) -> Tensor:
    """Return (U, D), the features of the image tower."""
    tower = model.model.visual
    return tower(prompt["pixel_values"], grid_thw=prompt["image_grid_thw"]).pooler_output


def parity_of(models: dict[str, nn.Module]) -> dict[str, Any]:
    """Compare the dense model with the reduced one for an image of noise, which repeats nothing."""
    noise = Image.effect_noise((112, 140), 80).convert("RGB")
    prompt = prompt_of(noise)
    exact = prefill(models[DENSE], prompt)
    error = relative_error(prefill(models[f"{TOLERANCES[0]:g}"], prompt), exact)
    return check_errors({DENSE: 0.0, "dedup": error}, ours=["dedup"])


def measure(models: dict[str, nn.Module], image: Image.Image, rounds: int) -> dict[str, Any]:
    """Return what one image costs each model, and how similar its features are."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    prompt = prompt_of(Image.open(file))
    dense = features(models[DENSE], prompt)
    removed, cosine = {}, {}
    for name, model in list(models.items())[1:]:
        own = features(model, prompt)
        stays = own.any(1)
        removed[name] = 1 - float(stays.float().mean())
        cosine[name] = float(F.cosine_similarity(own[stays], dense[stays]).mean())
    result = {"units": len(dense), "pixels": image.size, "removed": removed, "cosine": cosine}
    for phase, call in {"tower": features, "prefill": prefill}.items():
        steps = {name: partial(call, model, prompt) for name, model in models.items()}
        times = time_side_by_side(steps, device=DEVICE, rounds=rounds)
        ratios = ratios_to(DENSE, times)
        del ratios[DENSE]
        result[phase] = {"ratios": ratios, "milliseconds": milliseconds(times)}
    return result


def main(arguments: list[str] | None = None) -> None:
    """Measure every document, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--smallest", action="store_true", help="a tiny model, for the tests")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args(arguments)
    model = qwen(args.smallest)
    models = {DENSE: model}
    for tolerance in TOLERANCES:
        reduced = elip_models.reduce_(copy.deepcopy(model), f"dedup:tolerance={tolerance}")
        models[f"{tolerance:g}"] = reduced
    record = {
        **provenance(("transformers", "pillow")),
        "rounds": args.rounds,
        "quality": QUALITY,
        "text_tokens": TEXT_TOKENS,
        "parity": parity_of(models),
        "documents": {
            name: measure(models, draw(), args.rounds) for name, draw in DOCUMENTS.items()
        },
    }
    args.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
