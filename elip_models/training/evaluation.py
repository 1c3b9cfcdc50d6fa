"""What a run evaluates, on the way and at its end."""

from typing import TYPE_CHECKING

from elip_models.data import ClassSource, Source, open_classes, open_source
from elip_models.models.base import PretrainedModel
from elip_models.models.registry import family_of
from elip_models.tasks.retrieval import RetrievalScores, evaluate_retrieval
from elip_models.tasks.zero_shot import ZeroShotScores, evaluate_zero_shot
from elip_models.training.recipe import RunConfig
from elip_models.validation import ConfigError, blame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Scores = RetrievalScores | ZeroShotScores
TASKS = {"retrieval": evaluate_retrieval, "zero_shot": evaluate_zero_shot}


class Evaluation:
    """The tasks that a recipe names, their data, and the last scores of each.

    Raises:
        ConfigError: data that cannot be opened, or a model that has nothing to rank.
    """

    def __init__(self, config: RunConfig, image_size: int) -> None:
        self.config = config
        self.scores: dict[str, Scores] = {}
        self.sources: dict[str, Source | ClassSource] = {}
        self.at_end = [task for task in TASKS if task in config.report]
        family = family_of(config.model.name)
        if not family.ranks and (config.eval_every or self.at_end):
            raise ConfigError(
                f"report: expected no {' or '.join(self.at_end) or 'retrieval'}, and eval_every=0, "
                f"for {family.__name__}, which has no features of images and texts alone to rank"
            )
        if config.data.eval is not None:
            with blame("data.eval"):
                self.sources["retrieval"] = open_source(config.data.eval, image_size=image_size)
        if config.data.zero_shot is not None:
            with blame("data.zero_shot"):
                self.sources["zero_shot"] = open_classes(
                    config.data.zero_shot, image_size=image_size
                )

    def due(self, step: int, total_steps: int) -> list[str]:
        """The tasks after step `step`."""
        every = self.config.eval_every
        if every and step % every == 0:
            return list(self.sources)
        return self.at_end if step == total_steps else []

    def run(
        self, task: str, model: PretrainedModel, tokenizer: "PreTrainedTokenizerBase"
    ) -> Scores:
        """Evaluates one task; its scores are kept."""
        self.scores[task] = TASKS[task](
            model,
            tokenizer,
            self.sources[task],
            batch_size=self.config.optim.batch_size,
            num_workers=self.config.data.num_workers,
            max_bad_share=self.config.data.max_bad_share,
        )
        return self.scores[task]
