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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from elip_models.intervals import group_mean_interval
from elip_models.pretraining.data import (
    CompositionExample,
    CompositionSource,
    DataError,
    open_composition,
)
from elip_models.pretraining.tasks.features import TIE_TOLERANCE, unguided
from elip_models.pretraining.tasks.pairs import Method, PairScorer
from elip_models.pretraining.tasks.task import (
    EvaluationRun,
    EvaluationTask,
    Outcome,
    Prediction,
    TaskScores,
)

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
        name = type(model).__name__
        if not hasattr(model, "matching_logits") and (self.itm or not model.ranks):
            raise ValueError(
                "model: expected one with image-text matching (ALBEF, BLIP, METER), or with "
                f"features to rank and without itm, got {name}"
            )
        if self.guided and not model.reduction.is_guided:
            raise ValueError(
                f"model: expected one whose reduction a text guides, got {name} with the strategy "
                f"{model.reduction.name}; leave out guided"
            )

    def score(self, run: EvaluationRun) -> TaskScores:
        """Score the examples whose images can all be read, also by category."""
        source, method, loading = run.source, self.method(run.model), run.loading
        texts = [*dict.fromkeys(text for example in source.examples for text in example.captions)]
        numbers = {text: number for number, text in enumerate(texts)}
        scores: dict[str, dict[str, float]] = {}  # by id of the image, and caption
        with unguided():
            pairs = PairScorer(
                run.model, run.tokenizer, texts, method, loading.batch_size, loading.progress
            )
            for batch in run.batches:
                images = batch.images.to(run.device)
                rows = [row for row, several in enumerate(batch.captions) for _ in several]
                columns = [numbers[text] for several in batch.captions for text in several]
                encoded = {"guided": images} if self.guided else {"images": pairs.encode(images)}
                values = pairs.score(torch.tensor(rows), torch.tensor(columns), **encoded)
                values = iter(values.tolist())
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
        same_tokens = torch.unique(pairs.ids, dim=0, return_inverse=True)[1].tolist()
        token_sets = [[same_tokens[numbers[text]] for text in e.captions] for e in examples]
        result = TaskScores.of(
            self.name,
            _outcomes(examples, judgements, sizes),
            num_examples=len(examples),
            predictions=tuple(
                Prediction(example.id, json.dumps(similar), min(judgement.values()))
                for example, similar, judgement in zip(
                    examples, similarities, judgements, strict=True
                )
            ),
            notes={
                "benchmark": source.benchmark,
                "method": method,
                "guided": "yes" if self.guided else "no",
                "images": str(len(scores)),
                "examples without image": str(len(source.examples) - len(examples)),
                "examples with a wrong caption of the same tokens": str(
                    sum(right in wrong for right, *wrong in token_sets)
                ),
                "examples by category": ", ".join(f"{n}: {size}" for n, size in sizes.items()),
            },
        )
        if source.averages and sizes:
            grouped = [
                (judgement["accuracy"], example.category, example.cluster)
                for example, judgement in zip(examples, judgements, strict=True)
                if example.category in sizes
            ]
            macro = group_mean_interval(*zip(*grouped, strict=True))
            chance = result.baselines["chance"]
            first = {"accuracy": result.scores["accuracy"], "macro_accuracy": macro}
            averaged = {"accuracy": chance["accuracy"], "macro_accuracy": chance["accuracy"]}
            result = replace(
                result, scores=first | result.scores, baselines={"chance": averaged | chance}
            )
        return result


def _outcomes(
    examples: Sequence[CompositionExample],
    judgements: Sequence[Judgement],
    categories: Iterable[str],
) -> list[Outcome]:
    """Return the scores over all examples, then over those of each category."""
    return [
        Outcome(
            metric if category is None else f"{category}_{metric}",
            score,
            example.cluster,
            {"chance": PAIR_CHANCE.get(metric, 1 / len(example.captions))},
        )
        for category in (None, *categories)
        for example, judgement in zip(examples, judgements, strict=True)
        if category in (None, example.category)
        for metric, score in judgement.items()
    ]


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
