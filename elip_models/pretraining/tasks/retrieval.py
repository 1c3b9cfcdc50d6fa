"""Image-text retrieval: recall@k both ways, by features or re-ranked by image-text matching.

    ITC      (I, T) similarities of features, each side encoded alone
    ITM      matching score of each query with its k most similar candidates, encoded together
    score    ITM (ALBEF), or ITM + ITC (BLIP); all other candidates rank after these k

From image to text, a query is correct at k if any caption of the image is among the k best texts.
From text to image, it is correct if the caption's image is among the k best images. Ties within
1e-6, and candidates that are not re-ranked, count against the model: constant features have a
recall of 0. Intervals are over images, see `intervals`: the captions of an image are drawn
together. Entries of a list that show the same image form one image with all their captions.

A model without features (METER) scores every pair, and one without ITM (CLIP) ranks by features.
Images are encoded without text. With `guided`, a *query* caption guides the reduction of its
candidate images during re-ranking. An image that is the query is never reduced by a caption.
Recall is ours, since torchmetrics has neither several captions for an image nor this rule on ties.
Source: ALBEF (Li et al., 2021), section 4; BLIP (Li et al., 2022).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from elip_models.analysis.ranking import ranks_by_image, similarities, similarities_in_chunks
from elip_models.intervals import Interval, score_interval
from elip_models.pretraining.data import DataError, Sample, Source, open_source
from elip_models.pretraining.data.derived_sources import group_by_image
from elip_models.pretraining.data.samples import image_number
from elip_models.pretraining.tasks.features import check_features, encode_texts
from elip_models.pretraining.tasks.task import (
    EvaluationRun,
    Prediction,
    Preprocessor,
    Task,
    TaskScores,
    image_with_caption,
)
from elip_models.user_warnings import UnguidedWarning, ignoring
from elip_models.validation import Bounds

if TYPE_CHECKING:
    from elip_models.pretraining.models.base import PretrainedModel

KS = (1, 5, 10)
RECALLS = tuple(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in KS)
MAX_DRAWS = 1000  # draws for one caption of another image


def recall_at_k(
    images: Tensor, texts: Tensor, text_to_image: Tensor, ks: Sequence[int] = KS
) -> dict[str, float]:
    """Return recall@k both ways by the features of images (I, E) and texts (T, E).

    `text_to_image` (T,) is the row of the image that each text describes.
    """
    numbers = torch.arange(len(images), device=text_to_image.device)
    of_images, _ = ranks_by_image(similarities_in_chunks(images, texts), numbers, text_to_image)
    of_texts, _ = ranks_by_image(similarities_in_chunks(texts, images), text_to_image, numbers)
    ways = {"image_to_text": of_images, "text_to_image": of_texts}
    return {f"{way}_r{k}": (ways[way] < k).double().mean().item() for way in ways for k in ks}


def recall_intervals(
    of_images: Tensor, of_texts: Tensor, text_to_image: Tensor
) -> dict[str, Interval]:
    """Return the recalls of the ranks of both ways with their 95% intervals."""
    of_images, of_texts = of_images.cpu().numpy(), of_texts.cpu().numpy()
    owners = text_to_image.cpu().numpy()
    return {f"image_to_text_r{k}": score_interval(of_images < k) for k in KS} | {
        f"text_to_image_r{k}": score_interval(of_texts < k, owners) for k in KS
    }


def chance_level(
    text_to_image: Tensor, num_images: int, ks: Sequence[int] = KS
) -> dict[str, float]:
    """Return the expected recalls of a random ranking, with the names of `recall_at_k`.

    An image with c of the T texts is found at k with probability 1 - C(T-c, k) / C(T, k).
    """
    num_texts = len(text_to_image)
    counts = torch.bincount(text_to_image.cpu(), minlength=num_images).tolist()
    chance = {}
    for k in ks:
        ways = math.comb(num_texts, k)
        missed = sum(math.comb(num_texts - count, k) / ways if ways else 0.0 for count in counts)
        chance[f"image_to_text_r{k}"] = 1.0 - missed / num_images
    return chance | {f"text_to_image_r{k}": min(1.0, k / num_images) for k in ks}


class _Index(NamedTuple):
    """Images and captions of the data, and what is encoded of them."""

    names: list[str]
    texts: list[str]
    owners: Tensor  # (T,), the image of each text
    image_features: Tensor | None  # (I, E)
    text_features: Tensor | None  # (T, E)
    tokens: Tensor | None  # (I, N, D) for image-text matching, on the CPU
    pixels: Tensor | None  # (I, 3, S, S), if queries guide the reduction


class _Matcher:
    """Image-text matching of pairs from an index, `batch_size` pairs in a forward pass."""

    def __init__(self, run: EvaluationRun, index: _Index) -> None:
        self._model, self._device, self._index = run.model, run.device, index
        self._batch_size = run.loading.batch_size
        tokens = run.model.tokenise(run.tokenizer, index.texts)
        self._ids, self._mask = tokens["input_ids"], tokens["attention_mask"]

    def scores(self, images: Tensor, texts: Tensor, *, guided: bool) -> Tensor:
        """Return the scores (P,) on the CPU of pairs of images and texts, (P,) int64 numbers.

        With `guided`, each text guides the reduction of the image of its pair.
        """
        scores, size = [], self._batch_size
        for image, text in zip(images.split(size), texts.split(size), strict=True):
            ids, mask = self._ids[text].to(self._device), self._mask[text].to(self._device)
            if guided:
                pixels = self._index.pixels[image].to(self._device)
                guide = self._model.text_cls(ids, mask)
                tokens, _ = self._model.encode_image(pixels, guide)
            else:
                tokens = self._index.tokens[image].to(self._device)
            scores.append(self._model.matching_logits(tokens, ids, mask).float().cpu())
        return torch.cat(scores)


@dataclass(frozen=True)
class Retrieval(Task):
    """Image-text retrieval in both directions.

    Args:
        candidates: k, the number of candidates that ITM re-ranks, 128 and 256 in the originals. 0
            ranks by features alone.
        adds_similarity: Add the similarity of features to ITM's scores. None: as the original of
            the model does (BLIP adds it).
        guided: A query caption guides the reduction of its candidate images.
    """

    name: ClassVar[str] = "retrieval"
    metrics: ClassVar[tuple[str, ...]] = RECALLS
    candidates: Annotated[int, Bounds(0)] = 128
    adds_similarity: bool | None = None
    guided: bool = False

    def open(self, spec: str, *, image_size: int) -> Source:
        """Open images with captions."""
        return open_source(spec, image_size=image_size)

    def samples(self, source: Source) -> Source:
        """Return one sample for each image, with all of its captions."""
        return group_by_image(source)

    def check(self, model: "PretrainedModel") -> None:
        """Raise ValueError unless the model has features to rank, or image-text matching."""
        if self.guided and not (self.candidates and hasattr(model, "matching_logits")):
            raise ValueError(
                "guided: expected --rerank and a model with image-text matching (ALBEF, BLIP, "
                f"METER), got {type(model).__name__} and {self.candidates} candidates; leave out "
                "guided"
            )
        if self.candidates and not hasattr(model, "matching_logits"):
            super().check(model)
        if not self.candidates:
            check_features(model)

    def sample(
        self, preprocessor: Preprocessor, sample: Sample, index: int, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """Return an image with one of its captions, and the negatives that the model uses."""
        tensors = image_with_caption(preprocessor, sample, index, rng)
        tensors["image_ids"] = torch.tensor(image_number(preprocessor.source, index))
        number = getattr(preprocessor.model, "false_texts", 0)  # negatives of METER
        if not number:
            return tensors
        others = _sample_other_captions(preprocessor.source, index, number, rng)
        negatives = [preprocessor.text(text) for text in others]
        return tensors | {
            "false_ids": torch.stack([text["input_ids"] for text in negatives]),
            "false_mask": torch.stack([text["attention_mask"] for text in negatives]),
        }

    def score(self, run: EvaluationRun) -> TaskScores:
        """Score recall@k both ways."""
        matches = self.candidates > 0 and hasattr(run.model, "matching_logits")
        with ignoring(UnguidedWarning):
            index = self._encode(run, matches=matches)
            images, texts, owners = index.image_features, index.text_features, index.owners
            if matches:
                matcher = _Matcher(run, index)
                of_images, of_texts = (
                    self._matched(run, matcher, index, from_text=from_text)
                    for from_text in (False, True)
                )
            else:
                of_images = similarities_in_chunks(images, texts)
                of_texts = similarities_in_chunks(texts, images)
            numbers = torch.arange(len(index.names), device=owners.device)
            image_ranks, best = ranks_by_image(of_images, numbers, owners)
            text_ranks, _ = ranks_by_image(of_texts, owners, numbers)
        baselines = {"chance": chance_level(owners, len(numbers))}
        if matches and images is not None:
            baselines["features"] = recall_at_k(images, texts, owners)
        right = (owners[best] == numbers).double().tolist()
        predicted = [index.texts[text] for text in best.tolist()]
        return TaskScores(
            task=self.name,
            scores=recall_intervals(image_ranks, text_ranks, owners),
            baselines=baselines,
            num_examples=len(numbers),
            predictions=tuple(map(Prediction, index.names, predicted, right)),
            notes={
                "captions": str(len(index.texts)),
                "ranked by": f"ITM of {self.candidates} candidates" if matches else "features",
            },
        )

    def _encode(self, run: EvaluationRun, *, matches: bool) -> _Index:
        """Encode all images without text, and all captions alone."""
        model, features, tokens, pixels = run.model, [], [], []
        names, captions = [], []
        for batch in run.batches:
            images = batch.images.to(run.device)
            if matches:
                values, _ = model.encode_image(images)
                tokens.append(values.float().cpu())
                pixels += [batch.images] if self.guided else []
            if model.ranks:
                projected = model.project_image(values) if matches else model.image_features(images)
                features.append(projected.float())
            names += [sample.id for sample in batch.samples]
            captions += [sample.captions for sample in batch.samples]
        texts = [text for several in captions for text in several]
        owners = torch.tensor([image for image, several in enumerate(captions) for _ in several])
        encoded = [torch.cat(parts) if parts else None for parts in (tokens, pixels)]
        if not model.ranks:
            return _Index(names, texts, owners, None, None, *encoded)
        size, progress = run.loading.batch_size, run.loading.progress
        of_texts = encode_texts(model, run.tokenizer, texts, size, progress)
        of_images = torch.cat(features)
        if matches:  # which compares on the CPU
            of_images, of_texts = of_images.cpu(), of_texts.cpu()
        owners = owners.to(of_images.device)
        return _Index(names, texts, owners, of_images, of_texts, *encoded)

    def _matched(
        self, run: EvaluationRun, matcher: _Matcher, index: _Index, *, from_text: bool
    ) -> Iterator[Tensor]:
        """Yield the scores (1, C) of the candidates of each query, -inf if not re-ranked."""
        sides = (index.names, index.image_features), (index.texts, index.text_features)
        (queries, features), (candidates, others) = sides[::-1] if from_text else sides
        adds = self.adds_similarity
        if adds is None:
            adds = getattr(run.model, "adds_similarity", False)
        done, total = len(index.names) * from_text, len(index.names) + len(index.texts)
        for query in range(len(queries)):
            chosen, similarity = torch.arange(len(candidates)), torch.zeros(len(candidates))
            if features is not None:
                similarity = similarities(features[query : query + 1], others)[0]
                chosen = similarity.topk(min(self.candidates, len(candidates))).indices
            same = torch.full_like(chosen, query)
            pairs = (chosen, same) if from_text else (same, chosen)
            scores = torch.full((1, len(candidates)), -math.inf)
            scores[0, chosen] = matcher.scores(*pairs, guided=self.guided and from_text)
            run.loading.progress("query", done + query + 1, total)
            yield scores + similarity if adds else scores


def _sample_other_captions(
    source: Source, index: int, number: int, rng: np.random.Generator
) -> list[str]:
    """Draw captions of other images. Raise DataError if almost no other image has one."""
    texts: list[str] = []
    own, others = image_number(source, index), max(1, len(source) - 1)
    for _ in range(MAX_DRAWS * number):
        if len(texts) == number:
            return texts
        other = (index + 1 + int(rng.integers(others))) % len(source)
        is_other = image_number(source, other) != own
        if is_other and (captions := source.captions(other)):
            texts.append(captions[rng.integers(len(captions))])
    raise DataError(
        f"false_texts: expected captions of other images, got {len(texts)} in "
        f"{MAX_DRAWS * number} draws from {len(source)} samples"
    )
