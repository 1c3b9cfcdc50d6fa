"""Zero-shot classification with open_clip and a reduced image tower: K prompts, B images.

    pip install -e ".[open-clip]"
    python examples/open_clip_zero_shot.py --pretrained laion2b_s34b_b88k

Without --pretrained nothing is downloaded and the weights are random. The probabilities and the
cosines then have no meaning.
"""

import argparse

import open_clip
import torch
from PIL import Image

import elip_models

COLOURS = ("red", "green", "blue", "yellow", "black")


def picture(colour):
    """Return an image of a square on white."""
    image = Image.new("RGB", (300, 300), "white")
    image.paste(colour, (60, 60, 200, 200))
    return image


def main(name, pretrained, keep):
    """Classify three images before and after the reduction, and print both."""
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained)
    model.eval()
    images = torch.stack([preprocess(picture(colour)) for colour in COLOURS[:3]])  # B = 3
    prompts = open_clip.get_tokenizer(name)([f"a {colour} square" for colour in COLOURS])  # K = 5
    with torch.no_grad():
        dense = model.encode_image(images, normalize=True)
        elip_models.reduce_(model, keep=keep)
        print(elip_models.reduction_summary(model))
        image_features, text_features, scale = model(images, prompts)[:3]
        probabilities = (scale * image_features @ text_features.T).softmax(dim=1)  # (B, K)
    cosines = (image_features * dense).sum(1)
    for colour, row, cosine in zip(COLOURS[:3], probabilities, cosines, strict=True):
        best = COLOURS[row.argmax()]
        print(f"{colour:>6}: {best} ({row.max():.0%}), cosine to dense {cosine:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--pretrained", default=None)
    parser.add_argument("--keep", type=float, default=0.7)
    arguments = parser.parse_args()
    main(arguments.model, arguments.pretrained, arguments.keep)
