"""Image captioning by beam search, scored against human captions.

Files of NoCaps name a domain for each image; each domain also has scores of its own. Source: BLIP
(Li et al., 2022); CIDEr (Vedantam et al., 2015); NoCaps (Agrawal et al., 2019).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from elip_models.pretraining.data import JsonSource, Sample, Source, open_source
from elip_models.pretraining.data.derived_sources import group_by_image
from elip_models.pretraining.tasks.caption_metrics import caption_scores
from elip_models.pretraining.tasks.task import (
    EvaluationRun,
    Prediction,
    Preprocessor,
    Task,
    TaskScores,
    image_with_caption,
)
from elip_models.saving.files import write_json
from elip_models.validation import (
    Positive,
    PositiveInt,
    check_output,
    require_extra,
    require_packages,
)

with require_extra("elip_models.pretraining.tasks"):
    from transformers import GenerationConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from elip_models.pretraining.models.base import PretrainedModel


@dataclass(frozen=True)
class Captioning(Task):
    """Image captioning; the model's prompt precedes each caption.

    `num_beams`, `max_length`, `min_length` and `repetition_penalty` are those of transformers'
    `GenerationConfig`; lengths include the prompt and both special tokens.
    `submission` is a JSON file for the generated captions, in the format of the evaluation servers
    of COCO and NoCaps. With it, images without captions are read too; they have no score.
    """

    name: ClassVar[str] = "captioning"
    metrics: ClassVar[tuple[str, ...]] = ("cider", "bleu_4")
    num_beams: PositiveInt = 3
    max_length: PositiveInt = 20
    min_length: PositiveInt = 5
    repetition_penalty: Positive = 1.0
    submission: str | None = None

    def open(self, spec: str, *, image_size: int) -> Source:
        """Open images with captions."""
        require_packages("captioning", "pycocoevalcap")  # before a run, not at its end
        if self.submission is not None:
            check_output("submission", Path(self.submission))
        needs_captions = self.submission is None
        return open_source(spec, image_size=image_size, needs_captions=needs_captions)

    def sample(
        self, preprocessor: Preprocessor, sample: Sample, index: int, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """Return an image and one of its captions, with the prompt."""
        prompt = preprocessor.model.prompt
        return image_with_caption(preprocessor, sample, index, rng, prompt)

    def samples(self, source: Source) -> Source:
        """Return one sample for each image, with all of its captions."""
        return group_by_image(source)

    def score(self, run: EvaluationRun) -> TaskScores:
        """Score the captions that the model generates for images with captions."""
        written: list[str] = []
        captions: list[tuple[str, ...]] = []
        ids: list[str] = []
        for batch in run.batches:
            written += self.write(run.model, run.tokenizer, batch.images.to(run.device))
            captions += [sample.captions for sample in batch.samples]
            ids += [sample.id for sample in batch.samples]
        if self.submission is not None:  # in the format of the servers, whose ids are numbers
            numbers = [int(name) if name.isdecimal() else name for name in ids]
            rows = zip(numbers, written, strict=True)
            write_json(
                Path(self.submission), [{"image_id": n, "caption": text} for n, text in rows]
            )
        domains = run.source.domains() if isinstance(run.source, JsonSource) else {}
        known = [i for i, texts in enumerate(captions) if texts]
        scores, baselines, ciders = {}, {}, {}
        if known:
            references = [captions[i] for i in known]
            others = [references[i - 1][0] for i in range(len(known))]
            parts = [domains.get(ids[i], "") for i in known]
            scores, by_image = caption_scores([written[i] for i in known], references, parts)
            baseline, _ = caption_scores(others, references, parts)
            ciders = dict(zip(known, by_image, strict=True))
            baselines = {"another image's": {name: one.mean for name, one in baseline.items()}}
        return TaskScores(
            task=self.name,
            scores=scores,
            baselines=baselines,
            num_examples=len(known),
            predictions=tuple(
                Prediction(ids[i], text, ciders.get(i)) for i, text in enumerate(written)
            ),
            notes={"words": "by a plain rule, not by Stanford's PTB tokenizer"},
        )

    def write(
        self, model: "PretrainedModel", tokenizer: "PreTrainedTokenizerBase", images: Tensor
    ) -> list[str]:
        """Generate one caption for each image (B, 3, S, S), returned without the prompt."""
        prompt = torch.tensor(model.prompt_ids(tokenizer), device=images.device)
        prompt = prompt.expand(len(images), -1)
        decoding = GenerationConfig(
            num_beams=self.num_beams,
            max_length=self.max_length,
            min_length=self.min_length,
            repetition_penalty=self.repetition_penalty,
        )
        ids = model.generate(images, prompt=prompt, decoding=decoding)
        rest = ids[:, 1 + prompt.shape[1] :]
        return [text.strip() for text in tokenizer.batch_decode(rest, skip_special_tokens=True)]
