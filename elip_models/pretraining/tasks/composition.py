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

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, ClassVar

import torch

from elip_models.intervals import Interval, group_mean_interval, score_interval
from elip_models.pretraining.data import (
    CompositionExample,
    CompositionSource,
    DataError,
    open_composition,
)
from elip_models.pretraining.tasks.features import TIE_TOLERANCE, unguided
from elip_models.pretraining.tasks.pairs import Method, PairScorer
from elip_models.pretraining.tasks.task import EvaluationRun, EvaluationTask, Prediction, TaskScores

if TYPE_CHECKING:
    from elip_models.pretraining.models.base import PretrainedModel

PAIR_CHANCE = {"text_score": 1 / 4, "image_score": 1 / 4, "group_score": 1 / 6}
"""Metric of two images and two captions: the expected score of a model whose scores are random."""
Judgement = dict[str, float]
"""1.0 or 0.0 by metric, for one example."""


@dataclass(frozen=True)
class Composition(EvaluationTask):
    """Scoring of captions and images that differ in their composition.

    Args:
        itm: Score pairs by image-text matching instead of the cosine of features. A model without
            features (METER) always does so.
        guided: Let each candidate caption guide the reduction of its image.
    """

    name: ClassVar[str] = "composition"
    itm: bool = False
    guided: bool = False

    def open(self, spec: str, *, image_size: int) -> CompositionSource:
        """Open the benchmark that `spec` names; built-in images are drawn at `image_size`."""
        return open_composition(spec, image_size=image_size)

    def method(self, model: "PretrainedModel") -> Method:
        """Return how this model is scored."""
        return "itm" if self.itm or not model.ranks else "features"

    def check(self, model: "PretrainedModel") -> None:
        """Raise ValueError unless the model has what is compared."""
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

    def score(self, run: EvaluationRun) -> TaskScores:
        """Score the examples whose images can all be read, also by category."""
        source, method = run.source, self.method(run.model)
        texts = [*dict.fromkeys(text for example in source.examples for text in example.captions)]
        scores: dict[str, dict[str, float]] = {}  # by id of the image, and caption
        with unguided():
            pairs = PairScorer(
                run.model,
                run.tokenizer,
                texts,
                method,
                run.loading.batch_size,
                run.loading.progress,
            )
            for batch in run.batches:
                images, values = batch.images.to(run.device), []
                rows, columns = _pairs(batch.captions, texts)
                encoded = {"guided": images} if self.guided else {"images": pairs.encode(images)}
                values = iter(pairs.score(rows, columns, **encoded).tolist())
                for name, captions in zip(batch.ids, batch.captions, strict=True):
                    scores[name] = {text: next(values) for text in captions}
        examples = [example for example in source.examples if scores.keys() >= {*example.images}]
        if not examples:
            raise DataError(f"no example with all of its images: {run.report.summary()}")
        similarities = [
            [[scores[image][text] for image in example.images] for text in example.captions]
            for example in examples
        ]
        judgements = [judge(similar) for similar in similarities]
        counts = Counter(example.category for example in examples)
        sizes = {name: counts[name] for name in source.categories if counts[name]}
        outputs = zip(examples, similarities, judgements, strict=True)
        intervals = _scores(examples, judgements, sizes, averages=source.averages)
        chance = _chance(examples)
        return TaskScores(
            task=self.name,
            scores=intervals,
            baselines={
                "chance": {
                    name: next(v for metric, v in chance.items() if name.endswith(metric))
                    for name in intervals
                }
            },
            num_examples=len(examples),
            predictions=tuple(
                Prediction(example.id, json.dumps(similar), min(judgement.values()))
                for example, similar, judgement in outputs
            ),
            notes={
                "benchmark": source.benchmark,
                "method": method,
                "guided": "yes" if self.guided else "no",
                "images": str(len(scores)),
                "examples without image": str(len(source.examples) - len(examples)),
                "examples with a wrong caption of the same tokens": str(_ties(examples, pairs)),
                "examples by category": ", ".join(f"{n}: {size}" for n, size in sizes.items()),
            },
        )


def _pairs(
    captions: Sequence[Sequence[str]], texts: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the numbers of the image and of the text of each caption, (P,) each."""
    numbers = {text: number for number, text in enumerate(texts)}
    rows = [row for row, several in enumerate(captions) for _ in several]
    return torch.tensor(rows), torch.tensor([numbers[t] for several in captions for t in several])


def _ties(examples: Sequence[CompositionExample], pairs: PairScorer) -> int:
    """Return the number of examples with a further caption of the tokens of the first one."""
    same = torch.unique(pairs.ids, dim=0, return_inverse=True)[1].tolist()
    numbers = dict(zip(pairs.texts, same, strict=True))
    return sum(
        numbers[example.captions[0]] in [numbers[text] for text in example.captions[1:]]
        for example in examples
    )


def judge(similar: Sequence[Sequence[float]]) -> Judgement:
    """Return 1.0 or 0.0 by metric, from the scores of each caption with each image, (C, I).

    With two images, caption i describes image i; with one, the first caption is correct.
    """

    def above(one: float, other: float) -> bool:
        return one > other + TIE_TOLERANCE  # false for NaN

    if len(similar[0]) == 1:
        (right,), *wrong = similar
        return {"accuracy": float(all(above(right, score) for (score,) in wrong))}
    (first, crossed), (other_crossed, second) = similar
    text = above(first, other_crossed) and above(second, crossed)
    image = above(first, crossed) and above(second, other_crossed)
    return dict(zip(PAIR_CHANCE, map(float, (text, image, text and image)), strict=True))


def _scores(
    examples: Sequence[CompositionExample],
    judgements: Sequence[Judgement],
    categories: Sequence[str],
    *,
    averages: bool,
) -> dict[str, Interval]:
    """Return the interval of each metric, over all examples and over those of each category.

    With `averages`, also the mean of the accuracies of the categories.
    """
    rows = list(zip(examples, judgements, strict=True))
    scores = {}
    for category in (None, *categories):
        chosen = [row for row in rows if category in (None, row[0].category)]
        clusters = [example.cluster for example, _ in chosen]
        for metric in judgements[0]:
            name = metric if category is None else f"{category}_{metric}"
            scores[name] = score_interval([scored[metric] for _, scored in chosen], clusters)
        if category is None and averages and categories:
            numbers = {name: number for number, name in enumerate(categories)}
            grouped = [
                (scored["accuracy"], numbers[example.category], example.cluster)
                for example, scored in rows
                if example.category in numbers
            ]
            scores["macro_accuracy"] = group_mean_interval(*zip(*grouped, strict=True))
    return scores


def _chance(examples: Sequence[CompositionExample]) -> dict[str, float]:
    """Return the expected scores of a model whose scores are random and different."""
    if len(examples[0].images) == 2:
        return PAIR_CHANCE
    return {"accuracy": fmean(1 / len(example.captions) for example in examples)}
