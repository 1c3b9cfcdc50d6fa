"""The model that a recipe trains, before its first step."""

from typing import TYPE_CHECKING, Any

from elip_models.integrations.peft.adapt import adapt_, trainable_counts
from elip_models.pretraining.checkpoints.load import LoadReport
from elip_models.pretraining.checkpoints.pretrained_towers import load_pretrained_towers_
from elip_models.pretraining.checkpoints.warm_start import warm_start_
from elip_models.pretraining.models.base import PretrainedModel
from elip_models.pretraining.models.registry import create_model
from elip_models.pretraining.training.run_config import RunConfig
from elip_models.pretraining.training.training_data import input_fields
from elip_models.validation import ConfigError, as_config_error, require_extra

with require_extra("elip_models.pretraining.training"):
    from rich.console import Console
    from rich.markup import escape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKEN_EMBEDDINGS = ("token_embedding.weight", "word_embeddings.weight")


def make_model(
    config: RunConfig,
    tokenizer: "PreTrainedTokenizerBase",
    text_sizes: dict[str, Any],
    *,
    num_processes: int,
    resumed: bool,
    console: Console,
) -> PretrainedModel:
    """Create the model of a recipe and load its initial weights, unless the run is resumed.

    `text_sizes` are fields of the model's config that follow from tokenizer and data. A setting or
    weights that do not fit the model raise ConfigError.
    """
    optim = config.optim
    if (gather := config.model.overrides.get("gather", optim.gather)) != optim.gather:
        raise ConfigError(
            f"model.overrides.gather: expected {optim.gather!r}, the value of optim.gather, got "
            f"{gather!r}; set optim.gather instead"
        )
    with as_config_error("model"):
        overrides = text_sizes | input_fields(config.data) | config.model.overrides
        overrides |= {"gather": optim.gather}
        model = create_model(config.model.name, task=config.task, **overrides)
        model.check_batch_size(optim.batch_size * num_processes)
        model.read_vocabulary_(tokenizer)
    length, positions = config.data.context_length, model.config.context_length
    if "context_length" in text_sizes and length > positions:
        raise ConfigError(
            f"data.context_length: expected at most {positions}, the tokens that the model reads, "
            f"got {length}"
        )
    if not resumed:
        _load_initial_weights_(model, config, console)
    with as_config_error("peft"):
        adapt_(model, config.peft)
    if model.adapted is not None:
        trained, every = trainable_counts(model)
        console.print(f"{trained} of {every} parameters train ({trained / every:.2%})")
    with as_config_error("optim.batch_slices"):
        model.set_batch_slices(optim.batch_slices)
    if optim.grad_checkpointing:
        model.set_grad_checkpointing()
    return model


def _load_initial_weights_(model: PretrainedModel, config: RunConfig, console: Console) -> None:
    begin = config.model
    if begin.vision_init or begin.text_init:
        with as_config_error("model.vision_init, model.text_init"):
            load_pretrained_towers_(model, begin.vision_init, begin.text_init)
    if begin.pretrained:
        with as_config_error("model.pretrained"):
            start = warm_start_(
                model,
                begin.pretrained,
                allow_missing=begin.allow_missing,
                allow_unexpected=begin.allow_unexpected,
            )
        _check_tokens(start, config)
        console.print(escape(start.summary()), soft_wrap=True)


def _check_tokens(start: LoadReport, config: RunConfig) -> None:
    """Raise ConfigError if token embeddings were loaded for a tokenizer that is newly trained."""
    embeddings = [name for name in start.loaded if name.endswith(TOKEN_EMBEDDINGS)]
    if embeddings and config.data.tokenizer == "train":
        raise ConfigError(
            f"data.tokenizer: expected that of model.pretrained, whose {embeddings[0]} has a row "
            "for each of its tokens, got 'train', which makes others; set its folder, or use "
            "new embeddings through model.allow_missing and model.allow_unexpected"
        )
