"""Captions of an image, written by beam search, against those that people wrote.

Source: BLIP (Li et al., 2022); CIDEr (Vedantam et al., 2015).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from elip_models.data import Sample, Source, evaluation_batches, open_source
from elip_models.data.shared_images import by_image
from elip_models.models.base import eval_mode
from elip_models.models.layers.generation import Decoding
from elip_models.tasks.caption_metrics import caption_scores
from elip_models.tasks.features import isolated_rng
from elip_models.tasks.task import (
    Loading,
    Prediction,
    SampleReader,
    Task,
    TaskScores,
    read_all,
)
from elip_models.validation import PositiveInt, require_packages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from elip_models.models.base import PretrainedModel


@dataclass(frozen=True)
class Captioning(Task):
    """Captions of an image, each behind the model's prompt.

    num_beams, max_length, min_length: see `Decoding`.
    """

    name: ClassVar[str] = "captioning"
    num_beams: PositiveInt = 3
    max_length: PositiveInt = 20
    min_length: PositiveInt = 5

    def open(self, spec: str, *, image_size: int) -> Source:
        require_packages("captioning", "pycocoevalcap")  # said before a run, and not at its end
        return open_source(spec, image_size=image_size)

    def sample(
        self, reading: SampleReader, sample: Sample, index: int, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        caption = sample.captions[rng.integers(len(sample.captions))]
        text = reading.model.prompt + caption
        return {"images": reading.image(sample.image, rng), **reading.text(text)}

    def evaluate(
        self,
        model: "PretrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        source: Source,
        loading: Loading,
        answers: Sequence[str] | None = None,
    ) -> TaskScores:
        batches, report = read_all(evaluation_batches, model, by_image(source), loading)
        written: list[str] = []
        captions: list[tuple[str, ...]] = []
        ids: list[str] = []
        device = next(model.parameters()).device
        with eval_mode(model), isolated_rng(device):
            for batch in batches:
                written += self.write(model, tokenizer, batch.images.to(device))
                captions += batch.captions
                ids += batch.ids
        found = caption_scores(written, captions)
        of_others = [captions[i - 1][0] for i in range(len(captions))]
        blind = caption_scores(of_others, captions).scores
        return TaskScores(
            task=self.name,
            scores=found.scores,
            baselines={"another image's": {name: each.mean for name, each in blind.items()}},
            num_examples=len(written),
            num_skipped=len(report.reasons),
            predictions=tuple(map(Prediction, ids, written, found.each)),
            notes={"tokens": found.tokenizer},
        )

    def write(
        self, model: "PretrainedModel", tokenizer: "PreTrainedTokenizerBase", images: Tensor
    ) -> list[str]:
        """Images (B, 3, S, S) -> a caption each, without the prompt."""
        prompt = torch.tensor(model.prompt_ids(tokenizer), device=images.device)
        prompt = prompt.expand(len(images), -1)
        decoding = Decoding(
            num_beams=self.num_beams, max_length=self.max_length, min_length=self.min_length
        )
        ids = model.generate(images, prompt=prompt, decoding=decoding)
        rest = ids[:, 1 + prompt.shape[1] :]
        return [text.strip() for text in tokenizer.batch_decode(rest, skip_special_tokens=True)]
