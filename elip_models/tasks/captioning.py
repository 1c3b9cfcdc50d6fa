"""Image captioning by beam search, scored against human captions.

Source: BLIP (Li et al., 2022); CIDEr (Vedantam et al., 2015).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from elip_models.data import Sample, Source, evaluation_batches, open_source
from elip_models.data.shared_images import group_by_image
from elip_models.models.base import eval_mode
from elip_models.models.layers.generation import Decoding
from elip_models.tasks.caption_metrics import caption_scores
from elip_models.tasks.features import isolated_rng
from elip_models.tasks.task import Loading, Prediction, Preprocessor, Task, TaskScores, read_all
from elip_models.validation import PositiveInt, require_packages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from elip_models.models.base import PretrainedModel


@dataclass(frozen=True)
class Captioning(Task):
    """Image captioning; the model's prompt precedes each caption.

    `num_beams`, `max_length` and `min_length` are documented in `Decoding`.
    """

    name: ClassVar[str] = "captioning"
    metrics: ClassVar[tuple[str, ...]] = ("cider", "bleu_4")
    num_beams: PositiveInt = 3
    max_length: PositiveInt = 20
    min_length: PositiveInt = 5

    def open(self, spec: str, *, image_size: int) -> Source:
        """Open images with captions."""
        require_packages("captioning", "pycocoevalcap")  # before a run, not at its end
        return open_source(spec, image_size=image_size)

    def sample(
        self, preprocessor: Preprocessor, sample: Sample, index: int, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """Return an image and one of its captions, with the prompt."""
        caption = sample.captions[rng.integers(len(sample.captions))]
        text = preprocessor.model.prompt + caption
        return {"images": preprocessor.image(sample.image, rng), **preprocessor.text(text)}

    def evaluate(
        self,
        model: "PretrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        source: Source,
        loading: Loading,
        answers: Sequence[str] | None = None,
    ) -> TaskScores:
        """Score the captions that the model generates; see `Task.evaluate`."""
        batches, report = read_all(evaluation_batches, model, group_by_image(source), loading)
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
        other_captions = [captions[i - 1][0] for i in range(len(captions))]
        baseline = caption_scores(other_captions, captions).scores
        return TaskScores(
            task=self.name,
            scores=found.scores,
            baselines={"another image's": {name: each.mean for name, each in baseline.items()}},
            num_examples=len(written),
            num_skipped=len(report.reasons),
            predictions=tuple(map(Prediction, ids, written, found.each)),
            notes={"tokens": found.tokenizer},
        )

    def write(
        self, model: "PretrainedModel", tokenizer: "PreTrainedTokenizerBase", images: Tensor
    ) -> list[str]:
        """Generate one caption for each image (B, 3, S, S), returned without the prompt."""
        prompt = torch.tensor(model.prompt_ids(tokenizer), device=images.device)
        prompt = prompt.expand(len(images), -1)
        decoding = Decoding(
            num_beams=self.num_beams, max_length=self.max_length, min_length=self.min_length
        )
        ids = model.generate(images, prompt=prompt, decoding=decoding)
        rest = ids[:, 1 + prompt.shape[1] :]
        return [text.strip() for text in tokenizer.batch_decode(rest, skip_special_tokens=True)]
