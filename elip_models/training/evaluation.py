"""What a run evaluates, on the way and at its end."""

from typing import TYPE_CHECKING

from elip_models.data import ClassSource, Source, open_classes, open_source
from elip_models.models.base import PretrainedModel
from elip_models.models.registry import family_of
from elip_models.tasks.retrieval import RetrievalScores, evaluate_retrieval
from elip_models.tasks.task import Loading, TaskScores
from elip_models.tasks.zero_shot import ZeroShotScores, evaluate_zero_shot
from elip_models.training.run_config import RunConfig
from elip_models.training.training_data import open_samples, task_of
from elip_models.validation import ConfigError, as_config_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Scores = RetrievalScores | ZeroShotScores | TaskScores
OF_PRETRAINING = {"retrieval": evaluate_retrieval, "zero_shot": evaluate_zero_shot}


class Evaluation:
    """The tasks that a recipe names, or the one that it fine-tunes for, their data, and the last
    scores of each.

    Raises:
        ConfigError: data that cannot be opened, or a model that has nothing to rank.
    """

    def __init__(self, config: RunConfig, image_size: int) -> None:
        self.config = config
        self.answers: tuple[str, ...] | None = None  # that the model learns to give
        self.scores: dict[str, Scores] = {}
        self.sources: dict[str, Source | ClassSource] = {}
        self.task = task_of(config)
        if self.task is None:
            self._open_of_pretraining(image_size)
        elif config.data.eval is not None:
            with as_config_error("data.eval"):
                self.sources[self.task.name] = open_samples(config, config.data.eval, image_size)
        self.at_end = [name for name in self.sources if self.task or name in config.report]

    def _open_of_pretraining(self, image_size: int) -> None:
        config = self.config
        family = family_of(config.model.name)
        asked = [name for name in OF_PRETRAINING if name in config.report]
        if not family.ranks and (config.eval_every or asked):
            raise ConfigError(
                f"report: expected no {' or '.join(asked) or 'retrieval'}, and eval_every=0, "
                f"for {family.__name__}, which has no features of images and texts alone to rank"
            )
        if config.data.eval is not None:
            with as_config_error("data.eval"):
                self.sources["retrieval"] = open_source(config.data.eval, image_size=image_size)
        if config.data.zero_shot is not None:
            with as_config_error("data.zero_shot"):
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
        data, source = self.config.data, self.sources[task]
        loading = Loading(self.config.optim.batch_size, data.num_workers, data.max_bad_share)
        if self.task is not None:
            self.scores[task] = self.task.evaluate(model, tokenizer, source, loading, self.answers)
        else:
            evaluate = OF_PRETRAINING[task]
            self.scores[task] = evaluate(model, tokenizer, source, **loading._asdict())
        return self.scores[task]
