"""Samples of a source, prepared for a training step.

All random choices for a sample depend on (seed, turn, index) only, where the turn counts how often
the sample was used before. An unreadable sample is replaced and reported.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from elip_models.images import SampleError
from elip_models.pretraining.data.caption_rules import MAX_WORDS, CaptionRule, apply_caption_rule
from elip_models.pretraining.data.checks import check_not_empty
from elip_models.pretraining.data.read_errors import DataError, Skipped
from elip_models.pretraining.data.sample import Sample
from elip_models.pretraining.data.tokenizer import tokenize

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerBase

    from elip_models.pretraining.data.examples import Example, ExampleSource
    from elip_models.pretraining.data.sample import Source

_MAX_TRIES = 1000  # so that an unreadable source fails before all of it is tried


class TrainingSamples(Dataset):
    """Dataset of prepared training samples, indexed by (turn, index).

    A sample is the output of `prepare(sample, index, rng)`, tensors by name with fixed shapes, and
    "skipped": a list with the (id, reason, index) of the requested sample if another replaced it.
    DataError is raised if no sample can be read.

    Args:
        source: Samples or examples.
        prepare: Maps (sample, index, random generator) to tensors.
        seed: Seed of all random choices.
    """

    def __init__(
        self,
        source: "Source | ExampleSource",
        prepare: "Callable[[Sample | Example, int, np.random.Generator], dict[str, Tensor]]",
        *,
        seed: int,
    ) -> None:
        check_not_empty("source", source)
        self.source = source
        self.prepare = prepare
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: tuple[int, int]) -> dict[str, Any]:
        turn, index = position
        rng = np.random.default_rng((self.seed, turn, index))
        skipped: list[Skipped] = []
        place = index
        for _ in range(_MAX_TRIES):
            try:
                sample = self.source[place]
            except SampleError as error:
                skipped.append((error.id, error.reason, place))
                place = int(rng.integers(len(self)))
                continue
            # Replacements are reported when they are requested themselves. The share of reported
            # samples is therefore the share of unreadable ones.
            return {**self.prepare(sample, place, rng), "skipped": skipped[:1]}
        sample_id, reason, _ = skipped[0]
        raise DataError(f"no readable sample in {_MAX_TRIES} tries, such as {sample_id} ({reason})")


class ImageTextPreparation:
    """Preparation of an image and one of its captions.

    It returns {"images": (3, S, S), "input_ids": (L,), "attention_mask": (L,)}; the last two are
    int64, padded or truncated to L = `context_length`.

    Args:
        transform: Maps an image to a tensor (3, S, S). It may draw from torch's CPU generator,
            whose state outside does not change.
        tokenizer: A tokenizer with a pad token.
        context_length: Number of tokens of a text, at least 3.
        captions: Rule for the text of a caption, see `caption_rules`.
        max_words: Number of words that the rule keeps.
        guide_captions: Also return "guide_ids" and "guide_mask" (L,) of another caption of the
            image, or of the same one if it has no other.
    """

    def __init__(
        self,
        transform: "Callable[[Image.Image], Tensor]",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        context_length: int,
        captions: CaptionRule = "plain",
        max_words: int = MAX_WORDS,
        guide_captions: bool = False,
    ) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError("tokenizer: expected one with a pad token; use load_tokenizer")
        self.transform = transform
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.captions = captions
        self.max_words = max_words
        self.guide_captions = guide_captions

    def __call__(self, sample: Sample, index: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """Return the tensors of one sample; `rng` makes all random choices."""
        caption = sample.captions[rng.integers(len(sample.captions))]
        image = apply_seeded(self.transform, sample.image, rng)
        text = self._tokenize(caption)
        if self.guide_captions:
            guide = self._tokenize(other_caption(sample.captions, caption, rng))
            text |= {"guide_ids": guide["input_ids"], "guide_mask": guide["attention_mask"]}
        return {"images": image, **text}

    def _tokenize(self, caption: str) -> dict[str, Tensor]:
        cleaned = apply_caption_rule(caption, self.captions, self.max_words)
        return tokenize_text(cleaned, self.tokenizer, self.context_length)


def tokenize_text(
    text: str, tokenizer: "PreTrainedTokenizerBase", context_length: int
) -> dict[str, Tensor]:
    """Return "input_ids" and "attention_mask", (L,) int64 each, with L = `context_length`."""
    tokens = tokenize(tokenizer, [text], context_length)
    return {name: ids[0] for name, ids in tokens.items()}


def other_caption(captions: Sequence[str], caption: str, rng: np.random.Generator) -> str:
    """Draw another caption of an image, or return the same one if it has no other."""
    others = [other for other in captions if other != caption] or [caption]
    return others[rng.integers(len(others))]


def apply_seeded(
    transform: "Callable[[Image.Image], Tensor]", image: "Image.Image", rng: np.random.Generator
) -> Tensor:
    """Return `transform(image)` with torch's CPU generator seeded by `rng`, then restored."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed the accelerators of this process.
        torch.default_generator.manual_seed(int(rng.integers(2**63)))
        return transform(image)
