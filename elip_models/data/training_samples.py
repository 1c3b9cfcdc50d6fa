"""Samples of a source as a training step reads them: what is drawn for one depends on (seed, turn,
index) alone, its turn being how often it has come before. A sample that cannot be read is replaced
and reported.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from elip_models.data.caption_rules import CaptionRule, apply_caption_rule
from elip_models.data.checks import check_not_empty
from elip_models.data.read_errors import DataError, SkipReport
from elip_models.data.sample import Sample, SampleError, Source
from elip_models.data.tokenizer import tokenize
from elip_models.validation import Bounds, Count, Share, check

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerBase

    from elip_models.data.examples import Example, ExampleSource

# A share of unreadable samples that no limit could allow, long before the whole source is tried.
_MAX_REPLACEMENTS = 1000
_GOLDEN_RATIO = 0.6180339887


class TrainingSamples(Dataset):
    """A source as training samples, indexed by (turn, index).

    A sample is what `prepare(sample, index, rng)` makes of the source's: tensors by name, the same
    shapes each time; and "skipped", [(id, reason)], which names the sample that was drawn where it
    could not be read and another took its place. Raises DataError where no sample can be read.
    """

    def __init__(
        self,
        source: "Source | ExampleSource",
        prepare: "Callable[[Sample | Example, int, np.random.Generator], dict[str, Tensor]]",
        *,
        seed: int,
        max_bad_share: float = 0.05,
    ) -> None:
        check_not_empty("source", source)
        check("prepare", prepare, Callable)
        check("seed", seed, Count)
        check("max_bad_share", max_bad_share, Share)
        self.source = source
        self.prepare = prepare
        self.seed = seed
        self.max_bad_share = max_bad_share

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: tuple[int, int]) -> dict[str, Any]:
        turn, index = position
        sample, found, skipped = self._read(index)
        rng = np.random.default_rng((self.seed, turn, index))
        return {**self.prepare(sample, found, rng), "skipped": skipped}

    def skip_report(self) -> SkipReport:
        """A fresh report for this dataset's batches, with its limit."""
        return SkipReport(self.max_bad_share, length=len(self))

    def _read(self, index: int) -> "tuple[Sample | Example, int, list[tuple[str, str]]]":
        """The sample, or the first readable one of a fixed order that begins at `index`, and where
        it stands.

        Only the sample at `index` is reported: the others are when they are drawn themselves, so
        that the share of reported samples is the share of unreadable ones.
        """
        skipped: list[tuple[str, str]] = []
        for candidate in _replacements(index, len(self)):
            try:
                return self.source[candidate], candidate, skipped[:1]
            except SampleError as error:
                skipped.append((error.id, error.reason))
        raise DataError(f"no readable sample: {SkipReport.of(skipped).summary()}")


class ImageTextDataset(TrainingSamples):
    """Images with a caption each: every turn draws a caption and a crop.

    A sample is what `ImageTextPreparation` makes of the source's, and "skipped".
    """

    def __init__(
        self,
        source: Source,
        transform: "Callable[[Image.Image], Tensor]",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        context_length: int,
        seed: int,
        max_bad_share: float = 0.05,
        captions: CaptionRule = "plain",
        guide_captions: bool = False,
    ) -> None:
        prepare = ImageTextPreparation(
            transform,
            tokenizer,
            context_length=context_length,
            captions=captions,
            guide_captions=guide_captions,
        )
        super().__init__(source, prepare, seed=seed, max_bad_share=max_bad_share)


class ImageTextPreparation:
    """A sample as an image and one of its captions: {"images": (3, S, S), "input_ids": (L,),
    "attention_mask": (L,)}, L = `context_length`, int64, padded to it or truncated.

    With `guide_captions` there are "guide_ids" and "guide_mask" (L,) too, of another caption of the
    image, or of the same where it has no other. A caption is tokenised as `captions` says, see
    `caption_rules`. `transform` may use torch's CPU generator; its state outside is untouched.
    """

    def __init__(
        self,
        transform: "Callable[[Image.Image], Tensor]",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        context_length: int,
        captions: CaptionRule = "plain",
        guide_captions: bool = False,
    ) -> None:
        check("transform", transform, Callable)
        check("tokenizer", tokenizer, Callable)
        check("context_length", context_length, Annotated[int, Bounds(3)])
        check("captions", captions, CaptionRule)
        check("guide_captions", guide_captions, bool)
        if tokenizer.pad_token_id is None:
            raise ValueError("tokenizer: expected one with a pad token; use load_tokenizer")
        self.transform = transform
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.captions = captions
        self.guide_captions = guide_captions

    def __call__(self, sample: Sample, index: int, rng: np.random.Generator) -> dict[str, Tensor]:
        caption = sample.captions[rng.integers(len(sample.captions))]
        image = apply_seeded(self.transform, sample.image, rng)
        text = self._tokenize(caption)
        if self.guide_captions:
            guide = self._tokenize(other_caption(sample.captions, caption, rng))
            text |= {"guide_ids": guide["input_ids"], "guide_mask": guide["attention_mask"]}
        return {"images": image, **text}

    def _tokenize(self, caption: str) -> dict[str, Tensor]:
        text = apply_caption_rule(caption, self.captions)
        tokens = tokenize(self.tokenizer, [text], self.context_length)
        return {name: ids[0] for name, ids in tokens.items()}


def other_caption(captions: Sequence[str], caption: str, rng: np.random.Generator) -> str:
    """Draw another of an image's captions; the same where it has no other."""
    others = [other for other in captions if other != caption] or [caption]
    return others[rng.integers(len(others))]


def apply_seeded(
    transform: "Callable[[Image.Image], Tensor]", image: "Image.Image", rng: np.random.Generator
) -> Tensor:
    """`transform(image)`, which may draw by torch's CPU generator: seeded by `rng`, untouched
    outside.
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would reseed the accelerators of this process too.
        torch.default_generator.manual_seed(int(rng.integers(2**63)))
        return transform(image)


def _replacements(index: int, length: int) -> Iterator[int]:
    """`index`, then others spread over the source, each once: neighbours are often bad together."""
    stride = max(1, round(length * _GOLDEN_RATIO))
    while math.gcd(stride, length) != 1:
        stride += 1
    for step in range(min(length, _MAX_REPLACEMENTS)):
        yield (index + step * stride) % length
