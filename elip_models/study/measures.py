"""What is measured of a finished run, on held-out samples: a table of functions.

A measure takes a `Finished` run and gives numbers by name; one more is one more row of `MEASURES`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elip_models.data import (
    EvaluationBatch,
    SkipReport,
    Source,
    evaluation_batches,
    image_transform,
)
from elip_models.models.base import PretrainedModel
from elip_models.models.layers.losses import contrastive_loss
from elip_models.reduction.strategies.dense import Dense
from elip_models.reduction.strategy import Strategy
from elip_models.tasks.features import encode_images, encode_texts
from elip_models.tasks.retrieval import recall_of_features
from elip_models.training.loss_log import losses_of
from elip_models.training.recipe import RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTRASTED = 100  # pairs of a batch of the held-out contrastive loss


@dataclass(frozen=True)
class Finished:
    """A run whose model is there.

    config: of the run. model: in eval mode. tokenizer: of the model. source: `data.eval`.
    """

    config: RunConfig
    model: PretrainedModel
    tokenizer: "PreTrainedTokenizerBase"
    source: Source

    def batches(self) -> Iterator[EvaluationBatch]:
        """All samples, in order."""
        transform = image_transform(
            self.model.config.image_size, train=False, resize=self.model.config.resize
        )
        report = SkipReport(self.config.data.max_bad_share, length=len(self.source))
        return evaluation_batches(
            self.source,
            transform,
            self.config.optim.batch_size,
            report=report,
            num_workers=self.config.data.num_workers,
        )


def retrieval(run: Finished) -> dict[str, float]:
    """R@1 and R@5 both ways, r1, the mean of both R@1, and the contrastive loss, of images encoded
    "dense.", and "reduced." as the run reduces them, by the image alone; texts see no image."""
    model, found = run.model, {}
    texts: Tensor | None = None
    for name, strategy in {"dense": model.dense, "reduced": without_text(model.reduction)}.items():
        if name == "reduced" and isinstance(strategy, Dense):
            return found | {key.replace("dense", name): value for key, value in found.items()}
        with reduced_by(model, strategy):
            images, captions = encode_images(model, run.batches())
        if texts is None:
            flat = [text for several in captions for text in several]
            texts = encode_texts(model, run.tokenizer, flat, run.config.optim.batch_size)
        owners = [image for image, several in enumerate(captions) for _ in several]
        scores = _retrieval_of(model, images, texts, torch.tensor(owners, device=images.device))
        found |= {f"{name}.{key}": value for key, value in scores.items()}
    return found


def _retrieval_of(
    model: PretrainedModel, images: Tensor, texts: Tensor, owners: Tensor
) -> dict[str, float]:
    """Scores of features (I, E), (T, E) and the image of each text (T,)."""
    scores = recall_of_features(images, texts, owners, ks=(1, 5))
    scores["r1"] = (scores["image_to_text_r1"] + scores["text_to_image_r1"]) / 2
    firsts = texts[torch.searchsorted(owners, torch.arange(len(images), device=owners.device))]
    scale = 1 / model.monitored()["temperature"]
    whole = len(images) // CONTRASTED * CONTRASTED or len(images)
    batches = zip(images[:whole].split(CONTRASTED), firsts[:whole].split(CONTRASTED), strict=True)
    losses = [contrastive_loss(image, text, scale) for image, text in batches]
    return scores | {"contrastive_loss": torch.stack(losses).mean().item()}


def objectives(run: Finished) -> dict[str, float]:
    """Each loss of the model's training step, "objective.loss" and those it is made of, over whole
    batches: each image reduced as in training, under its own caption where that guides."""
    losses: list[dict[str, Tensor]] = []
    device = next(run.model.parameters()).device
    for batch in run.batches():
        firsts = [several[0] for several in batch.captions]
        if len(firsts) == run.config.optim.batch_size or not losses:
            text = run.model.tokenise(run.tokenizer, firsts)
            inputs = {"images": batch.images, **text}
            losses.append(losses_of(run.model(**{k: v.to(device) for k, v in inputs.items()})))
    means = {name: torch.stack([each[name] for each in losses]).mean() for name in losses[0]}
    return {f"objective.{name}": mean.item() for name, mean in means.items()}


MEASURES: dict[str, Callable[[Finished], dict[str, float]]] = {
    "retrieval": retrieval,
    "objectives": objectives,
}


@torch.no_grad()
def measure(run: Finished, names: tuple[str, ...]) -> dict[str, float]:
    """All metrics of these measures; what they draw at random follows the run's seed alone."""
    found = {}
    for name in names:
        with torch.random.fork_rng():
            torch.manual_seed(run.config.seed)
            found |= MEASURES[name](run)
    return found


def without_text(strategy: Strategy) -> Strategy:
    """The strategy where it has no text: guided by the image alone, if text would guide it."""
    if hasattr(strategy, "without_text"):
        return replace(strategy, without_text="vision")
    return strategy


@contextmanager
def reduced_by(model: PretrainedModel, strategy: Strategy) -> Iterator[None]:
    """Inside, the model's images are reduced by `strategy`."""
    own, model.reduction = model.reduction, strategy
    try:
        yield
    finally:
        model.reduction = own
