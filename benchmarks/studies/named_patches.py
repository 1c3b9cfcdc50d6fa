"""What a reduction keeps of the patches that a caption names.

    named = patches of which a quarter or more shows what the caption names
    kept  = share of the named patches whose own token is still there
    lost  = 1 - cos(feature of the reduced image, feature of all patches)

By chance, `kept` is the share of all patches that are kept.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from elip_kernels import ReductionInfo
from elip_models.analysis.visualize import patch_grid
from elip_models.engine.encode import run_tower
from elip_models.images import SampleError
from elip_models.pretraining.data import NamedMasks, Source, image_transform
from elip_models.pretraining.models.base import PretrainedModel
from elip_models.strategies.strategy import StageInfo
from elip_models.user_warnings import SlowScorerWarning, ignoring

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_SHOWN = 0.25
"""Smallest share of a named patch that shows what is named."""
SAMPLES, BATCH_SIZE = 200, 32


class _CaptionedImage(NamedTuple):
    """An image (3, S, S), its named patches (P,) bool, and the caption that names them."""

    image: Tensor
    named: Tensor
    caption: str


def selection_scores(
    model: PretrainedModel, source: Source, tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, float]:
    """Reduce images, each guided by one of its captions, and return means over the images.

    Image i uses caption i modulo the number of its captions.

    Args:
        model: A model in eval mode, whose strategy reduces the images.
        source: Images with captions; the first `SAMPLES` readable ones are used.
        tokenizer: The tokenizer of the model.

    Returns:
        'lost', and 'last.kept' and 'last.kept_chance' of the last stage. These two need a source
        with `NamedMasks` and a strategy that selects tokens, which ToMe does not.
    """
    samples = list(_read(model, source))
    measures: dict[str, list[Tensor]] = {}
    with ignoring(SlowScorerWarning):
        for start in range(0, len(samples), BATCH_SIZE):
            batch = _measure(model, tokenizer, samples[start : start + BATCH_SIZE])
            for name, values in batch.items():
                measures.setdefault(name, []).append(values)
    means = {name: torch.cat(values).double().nanmean() for name, values in measures.items()}
    return {name: mean.item() for name, mean in means.items() if not mean.isnan()}


def kept_patches(infos: Sequence[StageInfo], num_patches: int) -> list[Tensor] | None:
    """Return for each stage (B, num_patches) bool: the patches whose own token is kept.

    Merging into a kept token does not matter. The result is None if a step selects nothing.
    """
    kept, patches = [], None
    for info in infos:
        reduction = info.reduction
        if not isinstance(reduction, ReductionInfo):
            return None
        (B, K), p = reduction.kept.shape, reduction.num_prefix_tokens
        nowhere = reduction.kept.new_full((B, p + 1), num_patches)
        if patches is None:  # the patch of each token
            index = torch.arange(num_patches, device=reduction.kept.device)
            patches = torch.cat([nowhere[:, :p], index.expand(B, -1)], dim=1)
        left = patches.gather(1, reduction.kept)
        if reduction.mask is not None:
            left = left.where(reduction.mask[:, p : p + K], num_patches)
        flags = torch.zeros(B, num_patches + 1, dtype=torch.bool, device=left.device)
        kept.append(flags.scatter(1, left, True)[:, :num_patches])
        patches = torch.cat([nowhere[:, :p], left, nowhere[:, : reduction.merged]], dim=1)
    return kept


def _read(model: PretrainedModel, source: Source) -> Iterator[_CaptionedImage]:
    """Yield the first readable samples, each with one of its captions in turn."""
    size, resize = model.config.image_size, model.config.resize
    transform = image_transform(size, train=False, resize=resize)
    as_it_is = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    mask_transform = image_transform(size, train=False, resize=resize, **as_it_is)
    grid, count = patch_grid(model.tower), 0
    for index in range(len(source)):
        try:
            image, captions, _ = source[index]
        except SampleError:
            continue
        number = index % len(captions)
        named = torch.zeros(model.tower.num_patches, dtype=torch.bool)
        if isinstance(source, NamedMasks):
            mask = Image.fromarray(np.asarray(source.named_mask(index, number))).convert("RGB")
            shown = F.adaptive_avg_pool2d(mask_transform(mask)[:1], grid)
            named = shown.flatten() >= MIN_SHOWN
        yield _CaptionedImage(transform(image), named, captions[number])
        count += 1
        if count == SAMPLES:
            return


def _measure(
    model: PretrainedModel,
    tokenizer: "PreTrainedTokenizerBase",
    samples: Sequence[_CaptionedImage],
) -> dict[str, Tensor]:
    """Return the measures of a batch by name, (B,) each; NaN where nothing is named."""
    device = next(model.parameters()).device
    images = torch.stack([sample.image for sample in samples]).to(device)
    named = torch.stack([sample.named for sample in samples]).to(device)
    captions, guide = [sample.caption for sample in samples], None
    if model.reduction.is_guided:
        guide = model.encode_captions(tokenizer, captions)
    tokens, infos = run_tower(model.tower, images, guide, model.reduction)
    features = model.project_image(tokens)
    tokens, _ = run_tower(model.tower, images, None, model.dense, cls_only=True)
    measures = {"lost": 1 - F.cosine_similarity(features, model.project_image(tokens))}
    if kept := kept_patches(infos, named.shape[1]):
        chance = kept[-1].float().mean(1)
        measures["last.kept"] = (kept[-1] & named).sum(1) / named.sum(1)
        measures["last.kept_chance"] = chance.where(named.any(1), torch.nan)
    return measures
