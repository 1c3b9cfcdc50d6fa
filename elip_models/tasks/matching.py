"""Image-text retrieval, fine-tuned: features rank all, and ITM ranks the first of them anew.

    ITC      (I, T) similarities of features, each side encoded alone
    ITM      of each query's k most similar candidates, how well the pair fits, read together
    score    ITM (ALBEF), or ITM + ITC (BLIP); what is not among the k ranks behind

A model without features (METER) reads every pair, one without ITM (CLIP) ranks by features. Images
are encoded without text for the index; with `guided` a *query* caption reduces the images that it
is matched with, when the first are ranked anew, and never an image that looks for its captions.
Source: ALBEF (Li et al., 2021), section 4; BLIP (Li et al., 2022).
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from elip_kernels.autocast import no_autocast
from elip_models.data import (
    DataError,
    EvaluationBatch,
    Sample,
    Source,
    evaluation_batches,
    open_source,
    other_caption,
)
from elip_models.data.shared_images import by_image, image_number
from elip_models.models.base import eval_mode
from elip_models.reduction.caching import UnguidedWarning
from elip_models.tasks.features import encode_texts, isolated_rng, ranks_of
from elip_models.tasks.intervals import Interval, bootstrap_interval
from elip_models.tasks.retrieval import KS, chance_level
from elip_models.tasks.task import (
    Loading,
    Prediction,
    SampleReader,
    Task,
    TaskScores,
    read_all,
)
from elip_models.validation import PositiveInt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from elip_models.models.base import PretrainedModel

MOST_DRAWN = 1000  # samples for a caption of another image
WAYS = ("image_to_text", "text_to_image")


@dataclass(frozen=True)
class Retrieval(Task):
    """Images and captions that find one another.

    candidates: k, of which ITM ranks anew; 128 and 256 in the originals.
    adds_similarity: of features, to ITM's scores; None: as the model's original does (BLIP).
    guided: a query caption reduces its candidates, see above.
    """

    name: ClassVar[str] = "retrieval"
    candidates: PositiveInt = 128
    adds_similarity: bool | None = None
    guided: bool = False

    def open(self, spec: str, *, image_size: int) -> Source:
        return open_source(spec, image_size=image_size)

    def sample(
        self, reading: SampleReader, sample: Sample, index: int, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        caption = sample.captions[rng.integers(len(sample.captions))]
        found = {"images": reading.image(sample.image, rng), **reading.text(caption)}
        found["image_ids"] = torch.tensor(image_number(reading.source, index))
        if reading.model.reads_guide_captions:
            guide = reading.text(other_caption(sample.captions, caption, rng))
            found |= {"guide_ids": guide["input_ids"], "guide_mask": guide["attention_mask"]}
        number = getattr(reading.model, "false_texts", 0)  # METER learns by them
        if not number:
            return found
        others = [reading.text(text) for text in _others(reading.source, index, number, rng)]
        return found | {
            "false_ids": torch.stack([text["input_ids"] for text in others]),
            "false_mask": torch.stack([text["attention_mask"] for text in others]),
        }

    def evaluate(
        self,
        model: "PretrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        source: Source,
        loading: Loading,
        answers: Sequence[str] | None = None,
    ) -> TaskScores:
        batches, report = read_all(evaluation_batches, model, by_image(source), loading)
        drawn = isolated_rng(next(model.parameters()).device)
        with eval_mode(model), torch.no_grad(), drawn, warnings.catch_warnings():
            # Models warn where they get no text to reduce by; here that is meant.
            warnings.simplefilter("ignore", UnguidedWarning)
            index = _Index.of(model, tokenizer, batches, loading.batch_size, guided=self.guided)
            similar = index.similarities()
            by_features = (similar, similar.T) if similar is not None else None
            matches = hasattr(model, "matching_logits")
            of_images, of_texts = self._scores(index, similar) if matches else by_features
        baselines = {"chance": chance_level(index.owners, len(index.tokens))}
        if matches and by_features is not None:
            found = _recalls(*by_features, index.owners)
            baselines["features"] = {name: recall.mean for name, recall in found.items()}
        first = of_images.argmax(1)
        said = [index.texts[text] for text in first.tolist()]
        right = (index.owners[first] == torch.arange(len(first))).double().tolist()
        return TaskScores(
            task=self.name,
            scores=_recalls(of_images, of_texts, index.owners),
            baselines=baselines,
            num_examples=len(index.tokens),
            num_skipped=len(report.reasons),
            predictions=tuple(map(Prediction, index.names, said, right)),
        )

    def _scores(self, index: "_Index", similar: Tensor | None) -> tuple[Tensor, Tensor]:
        """How well pairs fit: (I, T) of images that look for texts, (T, I) of texts."""
        images, texts = len(index.tokens), len(index.ids)
        scores = torch.full((2, images, texts), -math.inf)
        for row in range(images):
            chosen = self._first(None if similar is None else similar[row], texts)
            scores[0, row, chosen] = index.match(torch.full_like(chosen, row), chosen)
        for row in range(texts):
            chosen = self._first(None if similar is None else similar[:, row], images)
            query = torch.full_like(chosen, row)
            guide = row if self.guided else None
            scores[1, chosen, row] = index.match(chosen, query, guide=guide)
        adds = self.adds_similarity
        if adds is None:
            adds = getattr(index.model, "adds_similarity", False)
        if similar is not None and adds:
            scores += similar
        return scores[0], scores[1].T

    def _first(self, similar: Tensor | None, number: int) -> Tensor:
        """The candidates that are ranked anew; all of them where nothing ranked them before."""
        if similar is None:
            return torch.arange(number)
        return similar.topk(min(self.candidates, number)).indices


def _others(source: Source, index: int, number: int, rng: np.random.Generator) -> list[str]:
    """Captions of other images, drawn at random; DataError where hardly any has one."""
    found: list[str] = []
    own, others = image_number(source, index), max(1, len(source) - 1)
    for _ in range(MOST_DRAWN * number):
        if len(found) == number:
            return found
        other = (index + 1 + int(rng.integers(others))) % len(source)
        is_other = image_number(source, other) != own
        if is_other and (captions := source.captions(other)):
            found.append(captions[rng.integers(len(captions))])
    raise DataError(
        f"false_texts: expected captions of other images, got {len(found)} in "
        f"{MOST_DRAWN * number} draws of {len(source)} samples"
    )


@dataclass(frozen=True)
class _Index:
    """Encoded images and texts, on the host.

    tokens: (N, D) of each image; masks: (N,) of each, None where all are real. images: (3, S, S)
    of each where queries guide. features: (I, E), (T, E). ids, mask: (T, L). owners: (T,), the
    image of each text. names: of the images. texts: as they stand. batch_size: pairs that are read
    at once.
    """

    model: "PretrainedModel"
    tokens: Tensor
    masks: Tensor | None
    images: Tensor | None
    features: tuple[Tensor, Tensor] | None
    ids: Tensor
    mask: Tensor
    owners: Tensor
    names: list[str]
    texts: list[str]
    batch_size: int

    @classmethod
    def of(
        cls,
        model: "PretrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        batches: "Iterable[EvaluationBatch]",
        batch_size: int,
        *,
        guided: bool,
    ) -> "_Index":
        """Encode all images without text, and all captions alone."""
        device, kept = next(model.parameters()).device, _Kept([], [], [], [])
        captions: list[tuple[str, ...]] = []
        names: list[str] = []
        for batch in batches:
            if hasattr(model, "matching_tokens"):
                tokens, mask = model.matching_tokens(batch.images.to(device))
                features = model.project_image(tokens) if model.ranks else None
            else:  # its features are all there is
                features, mask = model.image_features(batch.images.to(device)), None
                tokens = features[:, None]
            kept.tokens.append(tokens.float().cpu())
            kept.masks.append(None if mask is None else mask.cpu())
            kept.images.append(batch.images)
            if features is not None:
                kept.features.append(features.float().cpu())
            captions += batch.captions
            names += batch.ids
        texts = [text for several in captions for text in several]
        owners = [image for image, several in enumerate(captions) for _ in several]
        features = None
        if model.ranks:
            of_texts = encode_texts(model, tokenizer, texts, batch_size).cpu()
            features = torch.cat(kept.features), of_texts
        read = model.tokenise(tokenizer, texts)
        has_mask = kept.masks[0] is not None
        return cls(
            model=model,
            tokens=torch.cat(kept.tokens),
            masks=torch.cat(kept.masks) if has_mask else None,
            images=torch.cat(kept.images) if guided else None,
            features=features,
            ids=read["input_ids"],
            mask=read["attention_mask"],
            owners=torch.tensor(owners),
            names=names,
            texts=texts,
            batch_size=batch_size,
        )

    def similarities(self) -> Tensor | None:
        """(I, T) of features; None where the model has none."""
        if self.features is None:
            return None
        images, texts = self.features
        with no_autocast(images):
            return images @ texts.T

    def match(self, images: Tensor, texts: Tensor, guide: int | None = None) -> Tensor:
        """How well pairs fit, numbers of images and texts (P,) -> (P,); text `guide` reduces."""
        device = next(self.model.parameters()).device
        found = []
        for some, others in zip(
            images.split(self.batch_size), texts.split(self.batch_size), strict=True
        ):
            tokens, mask = self._tokens(some, guide, device)
            ids, real = self.ids[others].to(device), self.mask[others].to(device)
            found.append(self.model.matching_logits(tokens, mask, ids, real).float().cpu())
        return torch.cat(found)

    def _tokens(
        self, images: Tensor, guide: int | None, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        if guide is None:
            mask = None if self.masks is None else self.masks[images].to(device)
            return self.tokens[images].to(device), mask
        rows = slice(guide, guide + 1)
        text_cls = self.model.text_cls(self.ids[rows].to(device), self.mask[rows].to(device))
        pixels = self.images[images].to(device)
        return self.model.matching_tokens(pixels, text_cls.expand(len(pixels), -1))


class _Kept(NamedTuple):
    """Lists of what batches leave."""

    tokens: list[Tensor]
    masks: list[Tensor | None]
    images: list[Tensor]
    features: list[Tensor]


def _recalls(of_images: Tensor, of_texts: Tensor, owners: Tensor) -> dict[str, Interval]:
    """Recall@k both ways, by scores (I, T) that images look by and (T, I) that texts look by."""
    relevant = torch.arange(len(of_images))[:, None] == owners[None]
    ranks = ranks_of(of_images, relevant), ranks_of(of_texts, relevant.T)
    return {
        f"{way}_r{k}": bootstrap_interval((of_way < k).double().tolist())
        for way, of_way in zip(WAYS, ranks, strict=True)
        for k in KS
    }
