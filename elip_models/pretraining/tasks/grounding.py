"""Weakly supervised grounding: find what an expression refers to, by Grad-CAM of ITM.

    s        ITM score of expression and image
    A        cross attention of one layer, from text tokens l to image tokens n   (H, L, N)
    c_n      mean over heads and text tokens of relu(ds / dA) A, then copied to the patches of n
    heat     c on the grid of patches, upsampled to the image (bicubic)
    box      arg max over proposals b of sum(heat in b) / sqrt(area of b)

A model with fewer image tokens than patches gives the value of a merged token to all of its patches
and 0 to dropped patches. The mean covers the real text tokens, the first and the last included.

    accuracy    share of expressions whose box has an IoU of at least 0.5 with the true box
    pointing    share whose patch with the largest c has its centre in the true box; if patches tie,
                as those of one merged token do, the share of them. It needs no proposals

No box is chosen, and both metrics count as wrong, if nothing is above 0.
Source: ALBEF (Li et al., 2021), section 6.5, and Grounding.py of its official code; pointing game:
Zhang et al. (2016).
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_models.pretraining.data import ExampleSource, example_batches, open_examples
from elip_models.pretraining.data.samples import Target, image_number
from elip_models.pretraining.data.scene_sampling import Box
from elip_models.pretraining.models.layers.attention_map import attention_map
from elip_models.pretraining.tasks.features import unguided
from elip_models.pretraining.tasks.task import (
    EvaluationRun,
    EvaluationTask,
    Outcome,
    Prediction,
    TaskScores,
)
from elip_models.reduction.strategy import mask_after
from elip_models.reduction.token_assignment import slots_after
from elip_models.validation import Depth, require_extra

with require_extra("elip_models.pretraining.tasks"):
    from torchvision.ops import box_convert, box_iou

if TYPE_CHECKING:
    from elip_models.pretraining.models.base import PretrainedModel
    from elip_models.pretraining.models.cross_modal import CrossModalModel

MIN_IOU = 0.5
WITHOUT_MAP = "largest box, image centre"


class Heat(NamedTuple):
    """Grad-CAM of a batch: heat (B, rows, columns), and the image tokens of each image (B,)."""

    patches: Tensor
    num_tokens: Tensor


@dataclass(frozen=True)
class Grounding(EvaluationTask):
    """Grounding of expressions by ALBEF, BLIP or METER with ITM.

    The scores are "pointing" and, with proposals, "accuracy". Each split of the data has its own.

    Args:
        layer: Layer with cross attention, counted from 1. None: half of them, as ALBEF's 3 of 6.
        guided: The expression guides the reduction of its image. Otherwise no text does.
    """

    name: ClassVar[str] = "grounding"
    batch_size: ClassVar[int] = 32
    read: ClassVar[Callable[..., Iterator[Any]]] = staticmethod(example_batches)
    layer: Depth | None = None
    guided: bool = False

    def open(self, spec: str, *, image_size: int) -> ExampleSource:
        """Open expressions with boxes."""
        return open_examples("grounding", spec, image_size=image_size)

    def check(self, model: "PretrainedModel") -> None:
        """Raise TypeError or ValueError unless the model has a map of the layer."""
        cross_attention(model, self.layer)

    def score(self, run: EvaluationRun) -> TaskScores:
        """Score how well Grad-CAM of the model finds what expressions refer to."""
        model, source, outcomes, predictions, counts = run.model, run.source, [], [], []
        with unguided():
            for batch in run.batches:
                texts = model.tokenise(run.tokenizer, [example.text for example in batch.examples])
                texts = {name: ids.to(run.device) for name, ids in texts.items()}
                images = batch.images.to(run.device)
                heat = gradcam(model, images, **texts, layer=self.layer, guided=self.guided)
                counts += heat.num_tokens.tolist()
                for index, example, patches in zip(
                    batch.indices, batch.examples, heat.patches.float().cpu(), strict=True
                ):
                    target, box = source.target(index), None
                    image, prefix = image_number(source, index), target.split and f"{target.split}_"
                    score, baselines = pointing(patches, target, model.config.resize)
                    outcomes.append(Outcome(f"{prefix}pointing", score, image, baselines))
                    if target.proposals is not None:
                        box = best_box(
                            upsample(patches, target.size, model.config.resize), target.proposals
                        )
                        score, baselines = box_accuracy(box, target)
                        outcomes.append(Outcome(f"{prefix}accuracy", score, image, baselines))
                    output = "" if box is None else json.dumps([round(side, 2) for side in box])
                    predictions.append(Prediction(example.id, output, score))
        depth = len(cross_attention_layers(model))
        return TaskScores.of(
            self.name,
            outcomes,
            num_examples=len(predictions),
            predictions=tuple(predictions),
            notes={
                "layer": f"{self.layer or _default_layer(depth)} of {depth} with cross attention",
                "guidance": "the expression" if self.guided else "none",
                "image tokens": f"{fmean(counts):.1f} of {model.tower.size.num_tokens} on average",
            },
        )


def gradcam(
    model: "CrossModalModel",
    images: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    layer: int | None = None,
    guided: bool = False,
) -> Heat:
    """Compute Grad-CAM of the ITM score of images (B, 3, H, W) with texts (B, L), on all patches.

    The model should be in eval mode. Its weights get no gradient. For `layer` and `guided`, see
    `Grounding`.
    """
    attention = cross_attention(model, layer)
    with torch.no_grad():
        text_cls = model.text_cls(input_ids, attention_mask) if guided else None
        tokens, infos = model.encode_image(images, text_cls)
    mask = mask_after(infos)
    with torch.enable_grad(), attention_map(model, attention) as maps:
        scores = model.matching_logits(tokens, mask, input_ids, attention_mask)
        (attended,) = maps
        (gradient,) = torch.autograd.grad(scores.sum(), attended)
    real = (attention_mask != 0)[:, None, :, None]
    weights = gradient.relu() * attended.detach() * real
    heat = weights.mean(1).sum(1) / real.sum(2)[:, 0]
    slots = slots_after(info.reduction for info in infos)
    spread = heat if slots is None else slots.unmerged(heat[..., None])[..., 0]
    patches = spread[:, model.tower.num_prefix_tokens :]
    side = round(patches.shape[1] ** 0.5)  # our image towers are square, also of smaller images
    counts = torch.full((len(tokens),), tokens.shape[1]) if mask is None else mask.sum(1)
    return Heat(patches.unflatten(1, (side, side)), counts)


def cross_attention(model: nn.Module, layer: int | None = None) -> nn.Module:
    """Return the cross attention of a layer from text to image; see `Grounding`."""
    layers = cross_attention_layers(model)
    number = _default_layer(len(layers)) if layer is None else layer
    if not 1 <= number <= len(layers):
        raise ValueError(
            f"layer: expected 1 to {len(layers)}, the layers of {type(model).__name__} with cross "
            f"attention, got {layer}"
        )
    return layers[number - 1]


def cross_attention_layers(model: nn.Module) -> list[nn.Module]:
    """Return the attention modules from text to image of all layers that have one."""
    if not hasattr(model, "fusion_tower") or not hasattr(model, "matching_logits"):
        raise TypeError(
            "model: expected ALBEF, BLIP or METER with ITM, pre-trained or fine-tuned for "
            f"retrieval, got {type(model).__name__}"
        )
    layers = model.fusion_tower.layers
    return [layer.crossattention.self for layer in layers if layer.add_cross_attention]


def _default_layer(count: int) -> int:
    return (count + 1) // 2


def upsample(heat: Tensor, size: tuple[int, int], resize: str) -> Tensor:
    """Return the heat (rows, columns) of patches as one value for each pixel: (height, width).

    `size` is the width and height of the image. With resize='crop', the model reads the centre
    square of the image; pixels outside are 0.
    """
    left, top, width, height = read_area(size, resize)
    pixels = F.interpolate(heat[None, None], size=(height, width), mode="bicubic")[0, 0]
    right, bottom = size[0] - left - width, size[1] - top - height
    return F.pad(pixels, (left, right, top, bottom))


def read_area(size: tuple[int, int], resize: str) -> tuple[int, int, int, int]:
    """Return left, top, width and height of the area of an image that a model reads, in pixels."""
    width, height = size
    if resize == "squash":
        return 0, 0, width, height
    side = min(size)
    return (width - side) // 2, (height - side) // 2, side, side


def best_box(pixels: Tensor, boxes: Sequence[Box]) -> Box | None:
    """Return the box with the largest sum of the heat (height, width) over the root of its area.

    The area is that of the whole box, also outside of the image. The first of equal boxes is best;
    the result is None if no box is above 0.
    """
    highest, best = 0.0, None
    for box in boxes:
        left, top, width, height = box
        rows = slice(max(0, int(top)), max(0, int(top + height)))
        inside = pixels[rows, max(0, int(left)) : max(0, int(left + width))]
        score = inside.sum().item() / (width * height) ** 0.5
        if score > highest:
            highest, best = score, box
    return best


def ious(boxes: Sequence[Box], box: Box) -> list[float]:
    """Return the intersection over union of boxes with a box."""
    corners = (
        box_convert(torch.tensor(several).double(), "xywh", "xyxy") for several in (boxes, [box])
    )
    return box_iou(*corners)[:, 0].tolist()


def pointing(heat: Tensor, target: Target, resize: str) -> tuple[float, dict[str, float]]:
    """Return the share of the patches with the largest heat whose centre is in the true box.

    The baselines are a random pixel, and the centre of the image.
    """
    left, top, width, height = read_area(target.size, resize)
    rows, columns = (heat == heat.max()).nonzero().add(0.5).unbind(1)
    across, down = left + columns * width / heat.shape[1], top + rows * height / heat.shape[0]
    hits = _contains(target.box, across, down).double().mean().item()
    (width, height), (left, top, across, down) = target.size, target.box
    columns = max(0.0, min(width, left + across) - max(0.0, left))
    rows = max(0.0, min(height, top + down) - max(0.0, top))
    centre = _contains(target.box, torch.tensor(width / 2), torch.tensor(height / 2))
    baselines = {"chance": columns * rows / (width * height), WITHOUT_MAP: float(centre)}
    return hits if heat.max() > 0 else 0.0, baselines


def _contains(box: Box, across: Tensor, down: Tensor) -> Tensor:
    left, top, width, height = box
    in_columns = (left <= across) & (across < left + width)
    return in_columns & (top <= down) & (down < top + height)


def box_accuracy(box: Box | None, target: Target) -> tuple[float, dict[str, float]]:
    """Return 1.0 if the chosen box has the required IoU with the true one.

    The baselines are a random proposal, and the largest one.
    """
    if not target.proposals:
        return 0.0, {"chance": 0.0, WITHOUT_MAP: 0.0}
    right = [float(overlap >= MIN_IOU) for overlap in ious(target.proposals, target.box)]
    areas = [width * height for _, _, width, height in target.proposals]
    baselines = {"chance": fmean(right), WITHOUT_MAP: right[areas.index(max(areas))]}
    return (0.0 if box is None else right[target.proposals.index(box)]), baselines
