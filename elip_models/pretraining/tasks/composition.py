"""Zero-shot compositional benchmarks: which of similar captions belongs to which image.

    s(c, i)         cosine of the features of caption c and image i, or the ITM logit of the pair
    text score      s(0, 0) > s(1, 0) and s(1, 1) > s(0, 1)     Winoground: captions and images 0, 1
    image score     s(0, 0) > s(0, 1) and s(1, 1) > s(1, 0)
    group score     both
    accuracy        s(0, 0) > s(c, 0) for all wrong captions c    ARO and SugarCrepe
    macro_accuracy  mean over categories of their accuracies

Ties, within 1e-6, and NaN count against the model. Random scores have a text and an image score of
1/4 and a group score of 1/6: the two correct pairs must have the two largest of four scores.
Intervals are over images, see `intervals`.

Images are encoded without text. With `guided`, each candidate caption guides the reduction of the
image that it is scored against, so each pair needs an encoding of the image.
Source: Winoground (Thrush et al., 2022); ARO (Yuksekgonul et al., 2023); SugarCrepe (Hsieh et al.,
2023).
"""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from elip_kernels.autocast import no_autocast
from elip_models.intervals import Interval, group_mean_interval, score_interval
from elip_models.pretraining.data import (
    CompositionExample,
    CompositionSource,
    DataError,
    evaluation_batches,
    open_composition,
)
from elip_models.pretraining.models.base import eval_mode
from elip_models.pretraining.tasks.features import TIE_TOLERANCE, encode_texts, isolated_rng
from elip_models.pretraining.tasks.task import Loading, Progress, read_all
from elip_models.reduction.encode import run_tower
from elip_models.reduction.user_warnings import UnguidedWarning
from elip_models.validation import check_fields

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from elip_models.pretraining.models.base import PretrainedModel

Method = Literal["features", "itm"]


PAIR_CHANCE = {"text_score": 1 / 4, "image_score": 1 / 4, "group_score": 1 / 6}
"""Metric of two images and two captions: the expected score of a model whose scores are random."""


class Judgement(NamedTuple):
    """The scores of one example."""

    id: str
    category: str
    similarities: list[list[float]]  # of each caption, with each image
    scores: dict[str, float]  # 1 or 0, by metric


@dataclass(frozen=True)
class CompositionScores:
    """Scores of a model on a compositional benchmark."""

    benchmark: str
    method: Method  # what is compared
    guided: bool
    scores: dict[str, Interval]  # by metric
    chance: dict[str, float]  # of random scores, by metric
    categories: dict[str, dict[str, Interval]]  # by category and metric
    category_sizes: dict[str, int]  # scored examples
    num_examples: int  # scored ones
    num_images: int  # encoded ones; parts of one image count separately
    num_skipped: int  # images that could not be read
    num_without_image: int  # examples that are left out, since an image could not be read
    num_same_tokens: int  # examples with a wrong caption that is the same to the model: ties
    judgements: tuple[Judgement, ...] = field(default=(), repr=False)

    @property
    def metrics(self) -> dict[str, float]:
        """Means by name, for logs."""
        return {f"composition_{name}": found.mean for name, found in self.scores.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as JSON-compatible values."""
        categories = {name: _as_dicts(found) for name, found in self.categories.items()}
        judgements = [each._asdict() for each in self.judgements]
        shown = {"scores": _as_dicts(self.scores), "categories": categories}
        return {"task": "composition", **vars(self), **shown, "judgements": judgements}

    def summary(self) -> str:
        """Return one line with the means."""
        means = ", ".join(f"{name} {found.mean:.1%}" for name, found in self.scores.items())
        return f"{self.benchmark} by {self.method}: {means}"


def _as_dicts(intervals: Mapping[str, Interval]) -> dict[str, dict[str, float]]:
    return {name: found._asdict() for name, found in intervals.items()}


@dataclass(frozen=True)
class Composition:
    """Scoring of captions and images that differ in their composition.

    Args:
        itm: Score pairs by image-text matching instead of the cosine of features. A model without
            features (METER) always does so.
        guided: Let each candidate caption guide the reduction of its image.
    """

    itm: bool = False
    guided: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    def open(self, spec: str, *, image_size: int) -> CompositionSource:
        """Open the benchmark that `spec` names; built-in images are drawn at `image_size`."""
        return open_composition(spec, image_size=image_size)

    def method(self, model: "PretrainedModel") -> Method:
        """Return how this model is scored. Raise ValueError if it cannot be."""
        matches, name = hasattr(model, "matching_logits"), type(model).__name__
        if self.itm and not matches:
            raise ValueError(
                f"model: expected one with image-text matching (ALBEF, BLIP, METER) for itm, got "
                f"{name}; leave out itm"
            )
        if not matches and not model.ranks:
            raise ValueError(
                f"model: expected one that is pre-trained or fine-tuned for retrieval, got {name}, "
                "which scores no pairs of image and text"
            )
        if self.guided and not model.reduction.is_guided:
            raise ValueError(
                f"model: expected one whose reduction a text guides, got {name} with the strategy "
                f"{model.reduction.name}; leave out guided"
            )
        return "itm" if self.itm or not model.ranks else "features"

    def evaluate(
        self,
        model: "PretrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        source: CompositionSource,
        loading: Loading = Loading(),  # noqa: B008
    ) -> CompositionScores:
        """Score a model in eval mode; its mode and the random state are restored.

        Args:
            model: A pre-trained model, or one that is fine-tuned for retrieval. Its config sets the
                preprocessing.
            tokenizer: Tokenizer of the model.
            source: A benchmark, as `open_composition` returns it.
            loading: How data is read. `batch_size` images, texts or pairs are in one forward pass.

        Raises:
            ValueError: The model has neither features nor image-text matching, or not what was
                chosen.
            DataError: Too many images are unreadable, or no example has all of its images.
        """
        scorer = _PairScorer(model, self.method(model), self.guided, loading.batch_size)
        batches, report = read_all(evaluation_batches, model, source, loading)
        texts = [*dict.fromkeys(text for each in source.examples for text in each.captions)]
        numbers = {text: number for number, text in enumerate(texts)}
        found: dict[str, dict[str, float]] = {}  # score by id of an image and text of a caption
        drawn = isolated_rng(next(model.parameters()).device)
        with eval_mode(model), torch.no_grad(), drawn, warnings.catch_warnings():
            # Models warn when no text guides the reduction of image tokens.
            warnings.simplefilter("ignore", UnguidedWarning)
            scorer.read_texts(tokenizer, texts, loading.progress)
            for batch in batches:
                captions = [[numbers[text] for text in each] for each in batch.captions]
                scores = scorer.score(batch.images, captions)
                for name, own, values in zip(batch.ids, batch.captions, scores, strict=True):
                    found[name] = dict(zip(own, values, strict=True))
        kept = [each for each in source.examples if found.keys() >= {*each.images}]
        if not kept:
            raise DataError(f"no example with all of its images: {report.summary()}")
        judgements = [_judge(each, found) for each in kept]
        return CompositionScores(
            benchmark=source.benchmark,
            method=scorer.method,
            guided=self.guided,
            scores=_intervals(kept, judgements) | _macro(source, kept, judgements),
            chance=_chance(source, kept),
            categories={
                name: _intervals(kept, judgements, name) for name in _present(source, kept)
            },
            category_sizes=_present(source, kept),
            num_examples=len(kept),
            num_images=len(found),
            num_skipped=len(report.reasons),
            num_without_image=len(source.examples) - len(kept),
            num_same_tokens=sum(scorer.sees_equal(each.captions, numbers) for each in kept),
            judgements=tuple(judgements),
        )


@dataclass
class _PairScorer:
    """Scores of images with texts, which are read once; images are encoded batch by batch."""

    model: "PretrainedModel"
    method: Method
    guided: bool
    batch_size: int

    def read_texts(
        self, tokenizer: "PreTrainedTokenizerBase", texts: list[str], progress: Progress
    ) -> None:
        """Tokenise all texts, and encode them unless pairs are encoded together."""
        tokens = self.model.tokenise(tokenizer, texts)
        self.ids, self.mask, self.features = tokens["input_ids"], tokens["attention_mask"], None
        if self.method == "features":
            args = (self.model, tokenizer, texts, self.batch_size, progress)
            self.features = encode_texts(*args)
        self.same = torch.unique(self.ids, dim=0, return_inverse=True)[1].tolist()

    def sees_equal(self, captions: Sequence[str], numbers: Mapping[str, int]) -> bool:
        """Return whether a further caption has the tokens of the first one."""
        first, *others = (self.same[numbers[text]] for text in captions)
        return first in others

    def score(self, images: Tensor, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the scores of each image (B, 3, S, S) with its texts, given by number."""
        images = images.to(next(self.model.parameters()).device)
        encoded = None if self.guided else self._encode(images)
        rows = torch.tensor([row for row, several in enumerate(texts) for _ in several])
        columns = torch.tensor([number for several in texts for number in several])
        found: list[float] = []
        for some, others in zip(
            rows.split(self.batch_size), columns.split(self.batch_size), strict=True
        ):
            ids, mask = self.ids[others].to(images.device), self.mask[others].to(images.device)
            if encoded is None:
                tokens, real = self._encode(images[some], self.model.text_cls(ids, mask))
            else:
                tokens, real = (None if each is None else each[some] for each in encoded)
            if self.features is None:
                scores = self.model.matching_logits(tokens, real, ids, mask).float()
            else:
                with no_autocast(tokens):
                    scores = (tokens * self.features[others.to(images.device)]).sum(1)
            found += scores.tolist()
        values = iter(found)
        return [[next(values) for _ in several] for several in texts]

    def _encode(
        self, images: Tensor, text_cls: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the image tokens (B, N, D) and their mask, or features (B, E) fp32 and None."""
        model = self.model
        if self.method == "itm":
            return model.matching_tokens(images, text_cls)
        if text_cls is None:
            return model.image_features(images).float(), None
        tokens, _ = run_tower(model.tower, images, text_cls, model.reduction, cls_only=True)
        return model.project_image(tokens).float(), None


def _judge(example: CompositionExample, found: Mapping[str, Mapping[str, float]]) -> Judgement:
    """Score one example by the scores of its images with its captions."""
    similar = [[found[image][text] for image in example.images] for text in example.captions]
    return Judgement(example.id, example.category, similar, judge(similar))


def judge(similar: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return 1.0 or 0.0 by metric, from the scores of each caption with each image, (C, I).

    With two images, caption i describes image i; with one, the first caption is correct.
    """

    def above(one: float, other: float) -> bool:
        return one > other + TIE_TOLERANCE  # false for NaN

    if len(similar[0]) == 1:
        (right,), *wrong = similar
        return {"accuracy": float(all(above(right, each) for (each,) in wrong))}
    (first, crossed), (other_crossed, second) = similar
    text = above(first, other_crossed) and above(second, crossed)
    image = above(first, crossed) and above(second, other_crossed)
    return dict(zip(PAIR_CHANCE, map(float, (text, image, text and image)), strict=True))


def _intervals(
    examples: Sequence[CompositionExample],
    judgements: Sequence[Judgement],
    category: str | None = None,
) -> dict[str, Interval]:
    """Return the interval of each metric over the examples of a category (None: all)."""
    chosen = [
        (each.cluster, found.scores)
        for each, found in zip(examples, judgements, strict=True)
        if category in (None, each.category)
    ]
    clusters = [cluster for cluster, _ in chosen]
    return {
        name: score_interval([scores[name] for _, scores in chosen], clusters)
        for name in chosen[0][1]
    }


def _present(source: CompositionSource, examples: Sequence[CompositionExample]) -> dict[str, int]:
    """Return the number of examples of each category that is scored separately."""
    counts = Counter(each.category for each in examples)
    return {name: counts[name] for name in source.categories if counts[name]}


def _macro(
    source: CompositionSource,
    examples: Sequence[CompositionExample],
    judgements: Sequence[Judgement],
) -> dict[str, Interval]:
    """Return the mean over categories of the accuracies, if the benchmark reports it."""
    numbers = {name: number for number, name in enumerate(_present(source, examples))}
    if not source.averages or not numbers:
        return {}
    rows = [
        (found.scores["accuracy"], numbers[each.category], each.cluster)
        for each, found in zip(examples, judgements, strict=True)
        if each.category in numbers
    ]
    return {"macro_accuracy": group_mean_interval(*zip(*rows, strict=True))}


def _chance(source: CompositionSource, examples: Sequence[CompositionExample]) -> dict[str, float]:
    """Return the expected scores of a model whose scores are random and different."""
    if len(examples[0].images) == 2:
        return dict(PAIR_CHANCE)
    accuracy = fmean(1 / len(each.captions) for each in examples)
    return {"accuracy": accuracy, "macro_accuracy": accuracy}
