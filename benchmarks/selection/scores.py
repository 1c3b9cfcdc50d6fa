"""Measures of what a reduction keeps of the objects that a caption names, and what that changes.

    named    = patches of which a quarter or more shows what the caption names
    kept     = share of the named patches that are still tokens, or into which others were merged
    purity   = mean over named patches of the share of their token that is named; 0 where dropped
    changed  = share of the kept patches that are not kept with another caption
    agrees   = share of the tokens dropped by scorer `exact` that this one drops too
    lost     = 1 - cos(feature of the reduced image, feature of all patches)

Chance is the score of the same reduction if as many random patches were named. For `kept` it is the
share of all patches that are kept. For `purity`, where token t contains m_t of N patches and k are
named, it is the mean over patches, (1/N) sum_t (1 + (m_t - 1) (k - 1) / (N - 1)). For a strategy
without selection (ToMe), `kept` and `agrees` are None. Then `changed` is the share of the patches
whose token contains other patches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.selection.deletion_insertion import removal_areas
from elip_kernels import ReductionInfo
from elip_models.analysis.agreement import agreement_by_image
from elip_models.analysis.visualize import patch_grid, source_maps
from elip_models.images import SampleError
from elip_models.pretraining.data import DataError, NamedMasks, Source, image_transform
from elip_models.pretraining.models.base import PretrainedModel, eval_mode
from elip_models.pretraining.tasks.features import encode_texts, isolated_rng
from elip_models.reduction.encode import run_tower
from elip_models.reduction.schedule import Stage
from elip_models.reduction.strategies import ELIP
from elip_models.reduction.strategy import StageInfo, Strategy
from elip_models.reduction.strategy_spec import fit_strategy, get_strategy
from elip_models.reduction.user_warnings import ignore_slow_scorers
from elip_models.towers import Tower
from elip_models.validation import PositiveInt, check

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_SHOWN = 0.25
"""Smallest share of a named patch that shows what is named."""
NORMAL_95 = 1.96
OF_A_STAGE = (
    "kept",
    "kept_chance",
    "purity",
    "purity_chance",
    "changed_by_another_caption",
    "changed_by_another_image",
    "agrees",
    "agrees_chance",
)
OF_THE_WHOLE = ("named", "lost", "insertion", "deletion", "random", "all_patches")


def selection_scores(
    model: PretrainedModel,
    source: Source,
    tokenizer: "PreTrainedTokenizerBase",
    strategy: str | Strategy | None = None,
    *,
    limit: int = 200,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Reduce the images of a source, each guided by one of its captions, and measure what is kept.

    Image i uses caption i modulo the number of its captions. The model is set to eval mode and
    back. Random choices use one seed, and the state of the random generators is restored.

    Args:
        model: A model of this library; its config determines how images and captions are prepared.
        source: Images with captions. The measures of named patches need a source with `NamedMasks`;
            the change by another caption needs images with several.
        tokenizer: The tokenizer of the model.
        strategy: A spec or an instance; None: the model's own.
        limit: Number of readable samples, the first ones; at least two.
        batch_size: Images of a forward pass.

    Returns:
        A dict for JSON: 'strategy', 'num_images', 'num_patches'; 'stages', a list with 'block',
        'keep' and the measures `OF_A_STAGE`; and the measures `OF_THE_WHOLE`, with 'named' (share
        of the patches), 'lost', and the areas of `removal_areas` if the first step has scores and
        the model `ranks`. A measure is None if it is not defined. Otherwise it has the 'mean' over
        'images', and the ends 'low' and 'high' of its 95% interval by the normal distribution (None
        for a single image).

    Raises:
        TypeError, ValueError: An unknown strategy, or one that does not fit the model.
        DataError: Fewer than two readable samples.
    """
    check("limit", limit, PositiveInt)
    check("batch_size", batch_size, PositiveInt)
    chosen = model.reduction if strategy is None else get_strategy(strategy)
    selector = _Selector(model, tokenizer, fit_strategy(chosen, model.tower))
    shown = list(islice(_read(model, source), limit))
    if len(shown) < 2:
        raise DataError(f"source: expected two readable samples or more, got {len(shown)}")
    found = _measure(selector, shown, batch_size)
    return {
        "strategy": str(selector.strategy),
        "num_images": len(shown),
        "num_patches": model.tower.num_patches,
        "stages": [
            {"block": stage.first, "keep": stage.keep}
            | _summaries([batch.stages[stage] for batch in found], OF_A_STAGE)
            for stage in found[0].stages
        ],
        **_summaries([batch.whole for batch in found], OF_THE_WHOLE),
    }


def _measure(
    selector: "_Selector", shown: "list[_CaptionedImage]", batch_size: int
) -> "list[_BatchMeasures]":
    """Measure each batch; the caption of another image is that of the next image."""
    foreign = [each.own for each in (*shown[1:], shown[0])]
    device, batches = next(selector.model.parameters()).device, range(0, len(shown), batch_size)
    with eval_mode(selector.model), torch.no_grad(), isolated_rng(device), ignore_slow_scorers():
        torch.manual_seed(0)
        slices = (slice(start, start + batch_size) for start in batches)
        return [selector.measure(shown[each], foreign[each]) for each in slices]


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


def purity(named: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Return the purity of named patches, and its chance, as defined above; NaN if none is named.

    Args:
        named: (B, P) bool.
        source: (B, T, P) bool, the patches of each token.

    Returns:
        (B,) and (B,).
    """
    P, count = named.shape[1], named.sum(1)
    patches, named_patches = source.sum(2), (source & named[:, None]).sum(2)
    pure = (named_patches**2 / patches.clamp(min=1)).sum(1) / count
    expected = 1 + (patches - 1) * (count[:, None] - 1) / (P - 1)
    chance = (expected * (patches > 0)).sum(1) / P
    return pure, chance.where(count > 0, torch.nan)


class _CaptionedImage(NamedTuple):
    """An image (3, S, S), its named patches (P,) bool, the caption that names them, and another."""

    image: Tensor
    named: Tensor
    own: str
    another: str | None


def _read(model: PretrainedModel, source: Source) -> Iterator[_CaptionedImage]:
    """Yield the readable samples, each with one of its captions in turn and the next one."""
    size, resize = model.config.image_size, model.config.resize
    transform = image_transform(size, train=False, resize=resize)
    as_it_is = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    mask_transform = image_transform(size, train=False, resize=resize, **as_it_is)
    grid = patch_grid(model.tower)
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
        another = captions[(number + 1) % len(captions)] if len(captions) > 1 else None
        yield _CaptionedImage(transform(image), named, captions[number], another)


class _BatchMeasures(NamedTuple):
    """Measures of a batch by name, (B,) each: by stage, and of the whole image."""

    stages: dict[Stage, dict[str, Tensor]]
    whole: dict[str, Tensor]


@dataclass
class _Selector:
    """A model in eval mode and the strategy of its images."""

    model: PretrainedModel
    tokenizer: "PreTrainedTokenizerBase"
    strategy: Strategy

    def measure(self, shown: Sequence[_CaptionedImage], foreign: Sequence[str]) -> _BatchMeasures:
        """Measure a batch; `foreign` has for each image a caption of another image."""
        device = next(self.model.parameters()).device
        images = torch.stack([each.image for each in shown]).to(device)
        named = torch.stack([each.named for each in shown]).to(device)
        own = [each.own for each in shown]
        features, infos = self._reduce(images, own)
        by_stage = _kept(named, infos) | self._agreement(images, own)
        if self.strategy.is_guided:
            by_stage |= self._changes(images, infos, shown, foreign)
        stages = {
            info.stage: {name: values[i] for name, values in by_stage.items()}
            for i, info in enumerate(infos)
        }
        tokens, _ = run_tower(self.model.tower, images, None, self.model.dense, cls_only=True)
        lost = 1 - F.cosine_similarity(features, self.model.project_image(tokens))
        whole = {"named": named.float().mean(1), "lost": lost}
        return _BatchMeasures(stages, whole | self._areas(images, own, infos))

    def _guide(self, captions: Sequence[str]) -> Tensor | None:
        if not self.strategy.is_guided:
            return None
        return self.model.encode_captions(self.tokenizer, captions)

    def _reduce(self, images: Tensor, captions: Sequence[str]) -> tuple[Tensor, list[StageInfo]]:
        """Return the features (B, E) of images guided by captions, and the info of each step."""
        guide = self._guide(captions)
        tokens, infos = run_tower(self.model.tower, images, guide, self.strategy)
        return self.model.project_image(tokens), infos

    def _agreement(self, images: Tensor, own: Sequence[str]) -> dict[str, list[Tensor]]:
        if type(self.strategy) is not ELIP:
            return {}
        scorer, model, guide = self.strategy.scorer, self.model.visual, None
        if self.strategy.fusion < 1.0:  # `exact` uses the text, even if this scorer does not
            guide = self.model.encode_captions(self.tokenizer, own)
        shares = agreement_by_image(model, images, guide, self.strategy, (scorer,))
        return {"agrees": shares[scorer], "agrees_chance": shares["chance"]}

    def _changes(
        self,
        images: Tensor,
        infos: Sequence[StageInfo],
        shown: Sequence[_CaptionedImage],
        foreign: Sequence[str],
    ) -> dict[str, list[Tensor]]:
        another = [each.another or each.own for each in shown]
        has_another = torch.tensor([each.another is not None for each in shown])
        by_caption = _changed(infos, self._reduce(images, another)[1], self.model.tower)
        return {
            "changed_by_another_caption": [
                each.where(has_another.to(each.device), torch.nan) for each in by_caption
            ],
            "changed_by_another_image": _changed(
                infos, self._reduce(images, foreign)[1], self.model.tower
            ),
        }

    def _areas(
        self, images: Tensor, own: Sequence[str], infos: Sequence[StageInfo]
    ) -> dict[str, Tensor]:
        row = infos[0].attention if infos else None
        if row is None or not self.model.ranks:
            return {}
        texts = encode_texts(self.model, self.tokenizer, list(own), len(own))
        row = row[:, self.model.tower.num_prefix_tokens :]
        return removal_areas(self.model, images, texts, row)


def _kept(named: Tensor, infos: Sequence[StageInfo]) -> dict[str, list[Tensor]]:
    """Return `kept`, `purity` and their chances by stage for named patches (B, P)."""
    if not infos:
        return {}
    P, count, found = named.shape[1], named.sum(1), {}
    pairs = [purity(named, source) for source in source_maps(infos, P)[1:]]
    found["purity"], found["purity_chance"] = map(list, zip(*pairs, strict=True))
    kept = kept_patches(infos, P)
    if kept is not None:
        found["kept"] = [(each & named).sum(1) / count for each in kept]
        chance = [each.float().mean(1) for each in kept]
        found["kept_chance"] = [each.where(count > 0, torch.nan) for each in chance]
    return found


def _changed(infos: Sequence[StageInfo], others: Sequence[StageInfo], tower: Tower) -> list[Tensor]:
    """Return how much two reductions of the same images differ, (B,) for each stage."""
    P = tower.num_patches
    kept, other = kept_patches(infos, P), kept_patches(others, P)
    if kept is not None and other is not None:
        pairs = zip(kept, other, strict=True)
        return [(a & ~b).sum(1) / a.sum(1) for a, b in pairs]
    pairs = zip(_same_token(infos, P), _same_token(others, P), strict=True)
    return [(a != b).any(2).float().mean(1) for a, b in pairs]


def _same_token(infos: Sequence[StageInfo], num_patches: int) -> Iterator[Tensor]:
    """Yield for each stage (B, P, P) bool: which patches are part of one token."""
    for source in source_maps(infos, num_patches)[1:]:
        membership = source.float()
        yield membership.transpose(1, 2) @ membership > 0


def _summaries(measures: Sequence[dict[str, Tensor]], names: Sequence[str]) -> dict[str, Any]:
    return {
        name: _summary(torch.cat([each[name] for each in measures]))
        if name in measures[0]
        else None
        for name in names
    }


def _summary(values: Tensor) -> dict[str, float | int | None] | None:
    """Return the mean of the finite values and its 95% interval; None if there are none."""
    values = values[~values.isnan()].double()
    if not len(values):
        return None
    mean = values.mean().item()
    if len(values) == 1:
        return {"mean": mean, "low": None, "high": None, "images": 1}
    reach = NORMAL_95 * (values.std() / len(values) ** 0.5).item()
    return {"mean": mean, "low": mean - reach, "high": mean + reach, "images": len(values)}
