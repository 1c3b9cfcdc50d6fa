"""Measures of a finished run on held-out samples.

A measure is a function of a `Finished` run that returns numbers by name. Add your own to
`MEASURES`.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.studies.named_patches import selection_scores
from elip_models.analysis.ranking import ranks_of
from elip_models.pretraining.data import (
    EvaluationBatch,
    SkipReport,
    Source,
    evaluation_batches,
    open_source,
)
from elip_models.pretraining.models.base import PretrainedModel
from elip_models.pretraining.models.layers.losses import contrastive_loss
from elip_models.pretraining.tasks.features import encode_images, encode_texts
from elip_models.pretraining.tasks.retrieval import recall_at_k
from elip_models.pretraining.tasks.task import evaluation_transform
from elip_models.pretraining.training.loss_log import losses_of
from elip_models.pretraining.training.run_config import RunConfig
from elip_models.pretraining.training.run_folder import RunFolder
from elip_models.pretraining.training.trainer import train
from elip_models.strategies.dense import Dense
from elip_models.strategies.strategy import Strategy
from elip_models.validation import require_extra

with require_extra("benchmarks.studies"):
    from rich.console import Console

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FINETUNED = "finetuned"
CONTRASTED = 100  # pairs per batch of the held-out contrastive loss


@dataclass(frozen=True)
class Finished:
    """A run that has pre-trained.

    config: Its recipe.
    model: Its model in eval mode.
    tokenizer: The tokenizer of the model.
    finetuning: The recipe that fine-tunes the model, if the study has one.
    console: Where the progress of fine-tuning is shown.
    """

    config: RunConfig
    model: PretrainedModel
    tokenizer: "PreTrainedTokenizerBase"
    finetuning: RunConfig | None
    console: Console

    @cached_property
    def source(self) -> Source:
        """Open `data.eval` of the recipe."""
        return open_source(self.config.data.eval, image_size=self.model.config.image_size)

    def batches(self) -> Iterator[EvaluationBatch]:
        """Return batches of all samples, in order."""
        report = SkipReport(self.config.data.max_bad_share, length=len(self.source))
        return evaluation_batches(
            self.source,
            evaluation_transform(self.model),
            self.config.optim.batch_size,
            report=report,
            num_workers=self.config.data.num_workers,
        )


def retrieval(run: Finished) -> dict[str, float]:
    """Return retrieval scores of held-out images that are encoded without text.

    Keys: R@1 and R@5 in both directions, "r1" (the mean of both R@1), and for batches of 100 pairs
    "contrastive_loss" and "top1", the share of images and of texts whose own pair ranks first. The
    prefix is "dense." with all patches and "reduced." with the run's strategy, guided by the image.
    """
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
    """Return the scores of features (I, E), (T, E) and the image index of each text (T,)."""
    scores = recall_at_k(images, texts, owners, ks=(1, 5))
    scores["r1"] = (scores["image_to_text_r1"] + scores["text_to_image_r1"]) / 2
    firsts = texts[torch.searchsorted(owners, torch.arange(len(images), device=owners.device))]
    scale = 1 / model.monitored()["temperature"]
    whole = len(images) // CONTRASTED * CONTRASTED or len(images)
    batches = zip(images[:whole].split(CONTRASTED), firsts[:whole].split(CONTRASTED), strict=True)
    losses, firsts_ranked = [], []
    for image, text in batches:
        losses.append(contrastive_loss(image, text, scale))
        similar, own = image @ text.T, torch.eye(len(image), dtype=torch.bool, device=image.device)
        firsts_ranked += [ranks_of(similar, own) == 0, ranks_of(similar.T, own) == 0]
    scores["top1"] = torch.cat(firsts_ranked).double().mean().item()
    return scores | {"contrastive_loss": torch.stack(losses).mean().item()}


def objectives(run: Finished) -> dict[str, float]:
    """Return the means of "objective.loss" and its parts over whole batches.

    Each image is reduced as in training, guided by its first caption.
    """
    losses: list[dict[str, Tensor]] = []
    device = next(run.model.parameters()).device
    for batch in run.batches():
        firsts = [sample.captions[0] for sample in batch.samples]
        if len(firsts) == run.config.optim.batch_size or not losses:
            inputs = {"images": batch.images, **run.model.tokenise(run.tokenizer, firsts)}
            losses.append(losses_of(run.model(**{k: v.to(device) for k, v in inputs.items()})))
    means = {name: torch.stack([each[name] for each in losses]).mean() for name in losses[0]}
    return {f"objective.{name}": mean.item() for name, mean in means.items()}


def selection(run: Finished) -> dict[str, float]:
    """Return `selection_scores`: "selection.lost", "selection.last.kept"; none of a dense run."""
    if isinstance(run.model.reduction, Dense):
        return {}
    torch.manual_seed(0)
    return {
        f"selection.{name}": value
        for name, value in selection_scores(run.model, run.source, run.tokenizer).items()
    }


def finetuned(run: Finished) -> dict[str, float]:
    """Fine-tune the model, and return the scores of the downstream task on its own `data.eval`.

    The run of `elip finetune` is in the folder `finetuned` of the run, and resumes there if it was
    killed. The keys are "finetuned." and a metric of the task, such as "image_to_text_r1".
    """
    with torch.enable_grad():
        result = train(run.finetuning, resume=True, console=run.console)
    shutil.rmtree(RunFolder(result.output_dir).checkpoints.path)
    return {f"{FINETUNED}.{name}": score.mean for name, score in result.task_scores.scores.items()}


MEASURES: dict[str, Callable[[Finished], dict[str, float]]] = {
    "retrieval": retrieval,
    "objectives": objectives,
    "selection": selection,
    FINETUNED: finetuned,
}
RETRIEVAL_METRICS = {
    f"{images}.{metric}"
    for images in ("dense", "reduced")
    for metric in (
        *("image_to_text_r1", "image_to_text_r5", "text_to_image_r1", "text_to_image_r5"),
        *("r1", "top1", "contrastive_loss"),
    )
}
METRICS = {
    "retrieval": sorted(RETRIEVAL_METRICS),
    "objectives": ["objective.*"],
    "selection": ["selection.*"],
    FINETUNED: [f"{FINETUNED}.*"],
}
"""Patterns of the metrics of each measure; a measure without patterns can return any."""


@torch.no_grad()
def measure(run: Finished, names: tuple[str, ...]) -> dict[str, float]:
    """Return all metrics of these measures; the run's seed makes them reproducible."""
    found = {}
    for name in names:
        with torch.random.fork_rng():
            torch.manual_seed(run.config.seed)
            found |= MEASURES[name](run)
    return found


def without_text(strategy: Strategy) -> Strategy:
    """Return the strategy, guided by the image alone if text would guide it."""
    if hasattr(strategy, "without_text"):
        return replace(strategy, without_text="vision")
    return strategy


@contextmanager
def reduced_by(model: PretrainedModel, strategy: Strategy) -> Iterator[None]:
    """Set the model's strategy inside the context."""
    own, model.reduction = model.reduction, strategy
    try:
        yield
    finally:
        model.reduction = own
