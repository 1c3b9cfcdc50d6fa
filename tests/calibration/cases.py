"""Images with captions that a random model finds, and images with masks."""

import torch
import torch.nn.functional as F

from tests.helpers.towers import images

IGNORED = 255


class Words:
    """A tokenizer of texts of digits, for open_clip and transformers."""

    model_max_length = 8

    def __call__(self, texts, **options):
        rows = [[*map(int, text.split())] for text in texts]
        ids = torch.tensor([row + [49] + [0] * (7 - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()} if options else ids


@torch.no_grad()
def own_features(model, pixels, texts):
    """Return the normalised features of images and texts by the library's own methods."""
    ids = Words()(texts)
    if hasattr(model, "encode_image"):
        pair = model.encode_image(pixels), model.encode_text(ids)
    else:
        image = model.get_image_features(pixel_values=pixels).pooler_output
        text = model.get_text_features(input_ids=ids, attention_mask=(ids > 0).long())
        pair = image, text.pooler_output
    return [F.normalize(features, dim=-1) for features in pair]


def captions_found(model, pixels):
    """Return two captions for each image, of which the first finds it more often than chance."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(1, 48, (1000, 6), generator=generator).tolist()
    pool = [" ".join(map(str, row[: 1 + i % 6])) for i, row in enumerate(rows)]
    image, text = own_features(model, pixels, pool)
    similar, captions = text @ image.T, []
    for i, other in zip(range(len(pixels)), pool, strict=False):
        of_others = similar.clone()
        of_others[:, i] = -1
        best = (similar[:, i] - of_others.amax(1)).argmax()
        captions.append((pool[int(best)], other))
    return captions


def masks_of(shapes, classes=3):
    """Return masks of these sizes, with halves of two classes and an edge of none."""
    masks = []
    for i, (height, width) in enumerate(shapes):
        mask = torch.full((height, width), i % classes)
        mask[:, width // 2 :] = (i + 1) % classes
        mask[0] = IGNORED
        masks.append(mask)
    return masks


def scenes(masks, size=48):
    """Return noisy images in which each class has a brightness."""
    wide = [F.interpolate(mask[None, None].float(), (size, size))[0] for mask in masks]
    return torch.stack([w.expand(3, -1, -1) % IGNORED for w in wide]) - 1 + 0.1 * images(len(masks))
