"""The base class of our models: configuration, saving and loading, and the interface for training.

A saved folder contains config.json with the model's family, model.safetensors, a model card and the
tokenizer's files. Adapters of `adapt_` are saved in files of their own. A tensor that has several
names, such as tied embeddings, is written once, under its first name.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, ModelHubMixin
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from torch import Tensor, nn

from elip_models.images import CLIP_STATS, Stats
from elip_models.integrations.peft.adapt import adapt_, unadapted_name
from elip_models.integrations.peft.adaptable_model import AdaptableModel
from elip_models.integrations.peft.saved_adapter import (
    has_adapter,
    load_adapter_,
    save_adapter,
)
from elip_models.pretraining.models.config import reduction_fields
from elip_models.saving.files import read_config, read_tensors, write_json, write_tensors
from elip_models.saving.hub import CARD, card_values, fetch_folder
from elip_models.saving.meta_build import WithoutRandomValues, outline_of
from elip_models.saving.saved_folder import REPLACED, saved_folder
from elip_models.saving.weights import check_weights, first_names, load_weights
from elip_models.strategies import PatchDropout
from elip_models.strategies.dense import Dense
from elip_models.strategies.elip import ELIP
from elip_models.strategies.schedule import Schedule
from elip_models.strategies.spec import fit_strategy
from elip_models.strategies.strategy import Strategy
from elip_models.towers import as_tower
from elip_models.towers.reducible_model import check_tokenizer_in, random_ids
from elip_models.validation import Config, as_config_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WRITTEN = (*REPLACED, "answers.json", "selection.json")
"""Names of the files of an earlier save, and of those that a run writes beside a model."""


class PretrainedModel(
    AdaptableModel,
    ModelHubMixin,
    library_name="elip-kernels",
    tags=["image-text", "token-reduction", "elip"],
    model_card_template=CARD,
):
    """Base class of our models. `ModelHubMixin` provides `push_to_hub(repo_id)`.

    The output of a forward pass has `loss`, and one `loss_..` for each part of a sum.

    Attributes:
        family: name of the architecture in config.json.
        config_class: class of `config`.
        config: configuration; has `context_length` and the fields of `ReductionConfig`.
        visual: the image model.
        tower: adapter of `visual`, which runs it block by block.
        reduction: token reduction strategy of the forward pass.
        dense: the strategy that reduces nothing.
        ranks: whether `image_features` and `text_features` can be compared.
        task: name of the downstream task; None for pre-training.
        pretraining: class of the pre-trained model that a downstream model starts from.
        images_per_text: number of images of a text.
    """

    config_class: ClassVar[type[Config]]
    visual: nn.Module
    reduction: Strategy
    dense: Strategy
    task: ClassVar[str | None] = None
    pretraining: ClassVar[type["PretrainedModel"]]
    images_per_text: ClassVar[int] = 1

    @classmethod
    def from_pretraining(cls, weights: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Map the weights of a pre-trained model to the names of this model, with `config`.

        Its other parameters keep their initial values. `weights` are the state dict of
        `pretraining`, and do not change.
        """
        return weights

    def new_parameters(self) -> set[str]:
        if self.task is None:
            return set()
        kind = self.pretraining.config_class
        config = kind(**{field.name: getattr(self.config, field.name) for field in fields(kind)})
        with torch.device("meta"):
            pretrained = self.from_pretraining(self.pretraining(config).state_dict(), self.config)
        parameters = dict(self.named_parameters(remove_duplicate=False))
        known = {id(parameter) for name, parameter in parameters.items() if name in pretrained}
        return {name for name, parameter in parameters.items() if id(parameter) not in known}

    @classmethod
    def fit_tokenizer(
        cls, tokenizer: "PreTrainedTokenizerBase", context_length: int
    ) -> dict[str, int]:
        """Return the config fields that follow from a tokenizer and the length of a text.

        Special tokens that the tokenizer lacks are added. ValueError is raised if it does not fit.
        """
        raise NotImplementedError

    def read_vocabulary_(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Store what training needs of the vocabulary beside the config."""

    def load_tokenizer(self, name: str) -> "PreTrainedTokenizerBase":
        """Load the tokenizer that `save_pretrained` wrote into the folder `name`."""
        from elip_models.pretraining.data import load_tokenizer

        check_tokenizer_in(Path(name))
        tokenizer = load_tokenizer(name)
        if (largest := max(tokenizer.get_vocab().values())) >= self.config.vocab_size:
            raise ValueError(
                f"tokenizer: expected ids below the model's vocab_size {self.config.vocab_size}, "
                f"got {largest} in {name}; use the tokenizer that the model was trained with"
            )
        return tokenizer

    def tokenise(
        self, tokenizer: "PreTrainedTokenizerBase", captions: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return input_ids and attention_mask (B, L) of B captions, by the rule of the config."""
        from elip_models.pretraining.data import apply_caption_rule, tokenize

        rule, max_words = self.config.captions, self.config.max_words
        texts = [apply_caption_rule(caption, rule, max_words) for caption in captions]
        return tokenize(tokenizer, texts, self.config.context_length)

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Return the forward's arguments: images (B, 3, H, W), random texts and fixed labels.

        NLVR2 gets pairs of neighbouring images, VQA one answer of three tokens for each question.
        """
        config, numbers = self.config, torch.arange(len(images), device=images.device)
        ids = random_ids(images, config.context_length, config.vocab_size, config.end_token_id)
        answers, mask = ids[:, None, -3:], torch.ones_like(ids)
        if self.images_per_text == 2:
            images = torch.stack([images, images.roll(-1, 0)], 1)
        values = {
            "images": images,
            "input_ids": ids,
            "attention_mask": mask,
            "image_ids": numbers,
            "labels": torch.zeros_like(numbers),
            "answer_ids": answers,
            "answer_mask": torch.ones_like(answers),
            "answer_weights": torch.ones(len(images), 1, device=images.device),
        }
        arguments = signature(type(self).forward).parameters.values()
        required = {argument.name for argument in arguments if argument.default is argument.empty}
        return {name: value for name, value in values.items() if name in required}

    def as_tensor(self, output: Any) -> Tensor:
        """Return the loss of an output."""
        return output.loss

    def image_stats(self) -> Stats:
        """Return the colour statistics of CLIP, which our models are trained with."""
        return CLIP_STATS

    @property
    def image_model(self) -> nn.Module:
        """The same as `visual`."""
        return self.visual

    def project_image(self, tokens: Tensor) -> Tensor:
        """Return normalised features (B, E) of tokens (B, N, D); of CLS tokens if not `ranks`."""
        return F.normalize(tokens[:, 0], dim=-1)

    def text_cls(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the guidance (B, D) of the image tower from input_ids, attention_mask (B, L)."""
        raise NotImplementedError

    def encode_guidance(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return `text_cls(input_ids, attention_mask)`."""
        return self.text_cls(input_ids, attention_mask)

    def read_tower(self) -> None:
        """Set `tower`, `dense` and `reduction` from the image model and the config."""
        self.tower, self.dense = as_tower(self.visual), Dense()
        self.reduction = fit_strategy(self.config.reduction, self.tower)
        if self.config.reduction.has_open_rate:  # so that a saved model keeps its rate
            self.config = replace(self.config, **reduction_fields(self.reduction))

    def elip_strategy(self) -> ELIP:
        if type(self.reduction) is ELIP:
            return self.reduction
        family = self.family if self.task is None else self.pretraining.family
        return self.config.elip(Schedule.parse(family).for_depth(self.config.vision_depth))

    def set_reduction(self, strategy: Strategy | None) -> None:
        """Replace the strategy of the forward and of the config; None makes the model dense.

        Raises:
            TypeError, ValueError: the config cannot store the strategy, or forbids it.
        """
        config = replace(self.config, **reduction_fields(strategy or self.dense))
        self.reduction, self.config = fit_strategy(config.reduction, self.tower), config

    def begin_step(self, step: int, epoch: float = math.inf) -> None:
        """Update what depends on the step, from 0, or the epochs so far, such as patch dropout."""
        dropout = self.config.reduction
        if isinstance(dropout, PatchDropout):
            self.reduction = fit_strategy(dropout.for_step(step), self.tower)

    def clamp_temperature_(self) -> None:
        """Clamp the temperature to its interval, after a training step."""

    def reset_momentum_(self) -> None:
        """Make momentum copies, if any, equal to the parameters that they follow."""

    def check_batch_size(self, batch_size: int) -> None:
        """Raise ValueError if a step cannot have `batch_size` pairs over all ranks."""

    def monitored(self) -> dict[str, Tensor]:
        """Return scalars that the training log shows beside the losses."""
        return {}

    def set_batch_slices(self, count: int) -> None:
        """Encode a batch in `count` slices and recompute them in backward, to save memory.

        Gradients do not change. A loss that depends on more than features raises ValueError.
        """
        if count != 1:
            raise ValueError(
                f"expected 1, since the loss of {self.family} depends on more than features, "
                f"got {count}"
            )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute layers in the backward pass instead of saving their activations."""
        self.visual.set_grad_checkpointing(enable)

    def save_pretrained(
        self, folder: str | os.PathLike, tokenizer: Any = None, **options: Any
    ) -> Path:
        """Save the model; a kill or an error leaves the folder as it was.

        Args:
            folder: created if necessary. An earlier save in it is replaced, also one of another
                library; other files stay, and so does a README.md that was edited.
            tokenizer: saved into the folder too, unless it is None.
            options: of `ModelHubMixin.save_pretrained`, such as push_to_hub=True. Call
                `tokenizer.push_to_hub` as well for the tokenizer.

        Returns:
            The folder.
        """
        with saved_folder(folder, WRITTEN) as new:
            super().save_pretrained(new, **({"repo_id": Path(folder).name} | options))
            if tokenizer is not None:
                tokenizer.save_pretrained(new)
        return Path(folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model to the hub, and return the address of the commit.

        The commit removes the files of an earlier save that the model has not.

        Args:
            repo_id: 'owner/name'.
            options: of `ModelHubMixin.push_to_hub`.

        Raises:
            ConnectionError: the hub cannot be reached.
            OSError: its answer is an error, such as that of a wrong token.
        """
        try:
            return super().push_to_hub(repo_id, **({"delete_patterns": [*WRITTEN]} | options))
        except HfHubHTTPError:
            raise
        except HTTPError as error:
            raise ConnectionError(
                f"repo_id: expected a hub that can be reached, got {error} for {repo_id!r}; save "
                "the model by save_pretrained, and push it with a connection"
            ) from error

    def _save_pretrained(self, save_directory: Path) -> None:
        first, state = first_names(self), self.state_dict()
        weights = {
            unadapted_name(name): weight
            for name, weight in state.items()
            if first[name] == name and unadapted_name(name)
        }
        if self.adapted is not None:
            save_adapter(self, save_directory)
        write_tensors(save_directory / "model.safetensors", weights)
        config = {"model": self.family, **asdict(self.config)}
        write_json(save_directory / "config.json", config)

    def generate_model_card(self, **values: Any) -> ModelCard:
        """Return the model card, with the FLOPs of the image tower."""
        name = type(self).__name__
        ours = card_values(self.config.reduction, self.tower.size) | {
            "name": name,
            "about": f"{name} of elip-kernels, with token reduction in the image tower "
            "([ELIP](https://arxiv.org/abs/2309.16738)).",
            "usage": 'import elip_models\n\nmodel = elip_models.create_model("hf:owner/name")',
        }
        return super().generate_model_card(**(ours | values))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, *, token: str | bool | None = None) -> Self:
        """Load the model that `save_pretrained` wrote.

        Args:
            folder: a folder, or a repository of the hub, 'owner/name' or 'owner/name@revision'.
            token: access token of a private repository.

        Raises:
            FileNotFoundError: the folder, the repository, or one of the two files is missing.
            ValueError: the config is of another model, or the weights do not fit the config.
        """
        path = fetch_folder(folder, token=token)
        family, values = read_config(path)
        if family != cls.family:
            raise ValueError(f"folder: expected a {cls.__name__} config, got another in {path}")
        with as_config_error(str(path / "config.json")):
            config = cls.config_class.from_dict(values)
            if config.reduction.has_open_rate:
                raise ValueError(
                    f"strategy_options: expected the rate of {config.strategy!r}, got none; set it "
                    "in the file. Before version 0.2, none meant r=8, keep_ratio=0.7 of 'evit', "
                    "0.5 of 'patch_dropout', or schedule='clip'"
                )
        weights = read_tensors(path / "model.safetensors")
        try:
            # weights that do not fit take no memory
            check_weights(outline_of(lambda: cls(config)), weights)
        except ValueError as error:
            raise ValueError(
                f"folder: expected weights that fit {path}/config.json: {error}"
            ) from error
        with WithoutRandomValues():
            model = cls(config)
        load_weights(model, weights)
        return load_adapter_(model, path) if has_adapter(path) else model


def with_overrides(model: PretrainedModel, overrides: dict[str, Any]) -> PretrainedModel:
    """Return a model with the same weights and other config fields; ValueError if they misfit."""
    if not overrides:
        return model
    other = type(model)(type(model.config).from_dict(vars(model.config) | overrides))
    if model.adapted is not None:
        adapt_(other, model.adapted.config)
    load_weights(other, model.state_dict())
    return other


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set all modules to eval mode, and restore the mode of each on exit."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
