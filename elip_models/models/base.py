"""What all models have in common: a config that is data, weights on disk, and what training asks.

A saved folder holds config.json, which names the family, model.safetensors, a model card, the
tokenizer's files, and adapters of `adapt_` beside the weights without them. A tensor that has
several names, such as tied embeddings, is written once, under its first.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, ModelHubMixin
from torch import Tensor, nn

from elip_models.models.config import Config
from elip_models.models.io.files import read_config, read_tensors, write_file
from elip_models.models.io.hub import CARD, card_values, fetch_folder, staging_folder
from elip_models.models.io.weights import check_weights, first_names, load_weights
from elip_models.models.layers.guidance_sampling import with_dropout, with_negatives
from elip_models.models.peft.adapt import Adapted, adapt_, unadapted_name
from elip_models.models.peft.saved_adapter import (
    has_adapter,
    load_adapter_,
    remove_adapter,
    save_adapter,
)
from elip_models.reduction.strategies import PatchDropout
from elip_models.reduction.strategies.dense import Dense
from elip_models.reduction.strategy import Strategy
from elip_models.towers import ReducibleModel, Tower, as_tower
from elip_models.towers.reducible_model import Stats, check_tokenizer_in, clip_stats
from elip_models.towers.base import scoring_context

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PretrainedModel(
    nn.Module,
    ReducibleModel,
    ModelHubMixin,
    library_name="elip-kernels",
    tags=["image-text", "token-reduction", "elip"],
    model_card_template=CARD,
):
    """Base of the models. `push_to_hub(repo_id)` is `ModelHubMixin`'s.

    A subclass names its `family` and its `config_class`, and keeps its config in `config`, which
    has `context_length` and the fields of `ReductionConfig`. Its output has `loss`, and a `loss_..`
    for each of several parts. `visual` is the image model, and `tower` reads it. `ranks`: features
    of images and texts alone can be compared. `adapted` is what `adapt_` did to it. That of a
    downstream task names its `task`, the class whose weights it begins with, `pretraining`, and
    how, by `from_pretraining`.
    """

    reduces_itself = True
    family: ClassVar[str]
    config_class: ClassVar[type[Config]]
    config: Any
    visual: nn.Module
    tower: Tower
    reduction: Strategy
    dense: Strategy
    adapted: Adapted | None = None
    ranks: ClassVar[bool] = True
    task: ClassVar[str | None] = None
    pretraining: ClassVar[type["PretrainedModel"]]

    @classmethod
    def from_pretraining(cls, weights: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Name pre-trained weights as the parts of this model that begin with them.

        Args:
            weights: by the names of `pretraining`; left as they are.
            config: of this model.

        Returns:
            by the names of this model; what it has beside them stays as initialised.
        """
        return weights

    @property
    def image_model(self) -> nn.Module:
        """The same as `visual`."""
        return self.visual

    def image_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), without text -> (B, E), normalised; where the model `ranks`."""
        raise NotImplementedError

    def project_image(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, D) that the image tower leaves -> (B, E), normalised: the feature that is
        compared with texts; of a model that does not rank, the CLS token.
        """
        return F.normalize(tokens[:, 0], dim=-1)

    def text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask (B, L) -> (B, E), normalised; where the model `ranks`."""
        raise NotImplementedError

    def text_cls(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask (B, L) -> (B, D), what guides the image tower."""
        raise NotImplementedError

    def set_batch_slices(self, count: int) -> None:
        """Encode a batch in `count` slices and recompute them in backward: the same gradients for
        less memory, where the loss is over features alone (`layers/slices.py`).

        Raises:
            ValueError: a model whose loss is over more.
        """
        if count != 1:
            raise ValueError(
                f"expected 1, as the losses of {self.family} are over more than features, "
                f"got {count}"
            )

    def as_tensor(self, output: Any) -> Tensor:
        """The loss."""
        return output.loss

    def image_stats(self) -> Stats:
        """Those of CLIP: what the models are trained with here."""
        return clip_stats()

    def load_tokenizer(self, name: str) -> "PreTrainedTokenizerBase":
        """The tokenizer that `save_pretrained` wrote into the folder `name`."""
        from elip_models.data import load_tokenizer

        check_tokenizer_in(Path(name))
        return load_tokenizer(name)

    def tokenise(
        self, tokenizer: "PreTrainedTokenizerBase", captions: Sequence[str]
    ) -> dict[str, Tensor]:
        """B captions -> input_ids and attention_mask, (B, L) each, by the rule of the config."""
        from elip_models.data import apply_caption_rule, tokenize

        texts = [apply_caption_rule(caption, self.config.captions) for caption in captions]
        return tokenize(tokenizer, texts, self.config.context_length)

    def encode_guidance(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The same as `text_cls`."""
        return self.text_cls(input_ids, attention_mask)

    def read_tower(self) -> None:
        """Read the image model, and reduce it as the config says."""
        self.tower, self.dense = as_tower(self.visual), Dense()
        self.reduction = self.config.reduction.fitted(self.tower)

    def select_guidance(
        self,
        text_cls: Tensor,
        features: Tensor | None = None,
        scale: Tensor | None = None,
        guide_ids: Tensor | None = None,
        guide_mask: Tensor | None = None,
    ) -> Tensor:
        """Choose what guides the images of a step, as the config says.

        Args:
            text_cls: (B, D) of the captions that the images come with.
            features: (B, E) of the same captions, normalised, and the inverse temperature `scale`,
                where captions of other images may guide.
            guide_ids, guide_mask: (B, L) of other captions of the same images, where those do.

        Returns:
            (B, D); a row of zeros is no text. In eval mode nothing is drawn.

        Raises:
            ValueError: no guide_ids where the config says guide='other'.
        """
        config = self.config
        if not self.reduction.is_guided:
            return text_cls
        if config.reads_guide_captions:
            if guide_ids is None:
                raise ValueError(
                    "guide_ids: expected another caption of each image, (B, L), with "
                    "guide='other', got none; `elip train` gives them"
                )
            with scoring_context(self, text_cls):
                text_cls = self.text_cls(guide_ids, guide_mask)
        if self.training and features is not None and config.guide_negatives:
            text_cls = with_negatives(text_cls, features, scale, config.guide_negatives)
        if self.training and config.guide_dropout:
            text_cls = with_dropout(text_cls, config.guide_dropout)
        return text_cls

    def begin_step(self, step: int, epoch: float = math.inf) -> None:
        """Prepare step `step` of training, from 0, after `epoch` passes over the data: patch
        dropout ends where it ends.
        """
        dropout = self.config.reduction
        if isinstance(dropout, PatchDropout):
            self.reduction = dropout.at(step).fitted(self.tower)

    def clamp_temperature_(self) -> None:
        """Keep the temperature in its interval, after a step of training."""

    def check_batch_size(self, batch_size: int) -> None:
        """Raises ValueError where a step over `batch_size` pairs, of all ranks, cannot be made."""

    def monitored(self) -> dict[str, Tensor]:
        """Scalars that a log of training shows beside the losses."""
        return {}

    @classmethod
    def fit_tokenizer(
        cls, tokenizer: "PreTrainedTokenizerBase", context_length: int
    ) -> dict[str, int]:
        """Work out the fields of the config that follow from a tokenizer and the length of a text.

        Special tokens that the model needs and the tokenizer lacks are added to it.

        Raises:
            ValueError: a tokenizer that the model cannot read.
        """
        raise NotImplementedError

    def reset_momentum_(self) -> None:
        """Make momentum copies equal to what they follow, where the model has any."""

    def read_vocabulary_(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Learn what no config says of the tokens, before training."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute layers in backward instead of saving their activations."""
        raise NotImplementedError

    def save_pretrained(
        self, folder: str | os.PathLike, tokenizer: Any = None, **options: Any
    ) -> Path:
        """Write model.safetensors, config.json and the tokenizer, each file whole or not at all,
        and a model card where there is none; returns the folder.

        options: of `ModelHubMixin.save_pretrained`, such as push_to_hub=True, which takes the
            tokenizer only where `tokenizer.push_to_hub` is called too.
        """
        with staging_folder(Path(folder)) as stage:
            super().save_pretrained(stage, **({"repo_id": Path(folder).name} | options))
        if self.adapted is None:
            remove_adapter(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return Path(folder)

    def _save_pretrained(self, save_directory: Path) -> None:
        from safetensors.torch import save

        first, state = first_names(self), self.state_dict()
        weights = {
            unadapted_name(name): weight.detach().cpu().contiguous()
            for name, weight in state.items()
            if first[name] == name and unadapted_name(name)
        }
        if self.adapted is not None:
            save_adapter(self, save_directory)
        write_file(save_directory / "model.safetensors", save(weights, metadata={"format": "pt"}))
        config = {"model": self.family, **asdict(self.config)}
        write_file(save_directory / "config.json", (json.dumps(config, indent=2) + "\n").encode())

    def generate_model_card(self, **values: Any) -> ModelCard:
        """The card that `save_pretrained` writes, with the FLOPs of the image tower."""
        name = type(self).__name__
        said = {
            "name": name,
            "about": f"{name} of elip-kernels, whose image tower is reduced as the table says "
            "([ELIP](https://arxiv.org/abs/2309.16738)).",
            "usage": 'import elip_models\n\nmodel = elip_models.create_model("hf:owner/name")',
        }
        said |= card_values(self.config.reduction, self.tower.size)
        return super().generate_model_card(**(said | values))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, *, token: str | bool | None = None) -> Self:
        """Load the model that `save_pretrained` wrote.

        Args:
            folder: or a repository of the hub, 'owner/name' or 'owner/name@revision'.
            token: of a private repository.

        Raises:
            FileNotFoundError: no such folder or repository, or it lacks config.json or
                model.safetensors.
            ValueError: a config of another model, or weights that do not fit it.
        """
        path = fetch_folder(folder, token=token)
        family, config = read_config(path)
        if family != cls.family:
            raise ValueError(f"folder: expected a {cls.__name__} config, got another in {path}")
        weights, made = read_tensors(path / "model.safetensors"), cls.config_class.from_dict(config)
        try:
            with torch.device("meta"):  # what does not fit takes no memory
                check_weights(cls(made), weights)
        except ValueError as error:
            raise ValueError(
                f"folder: expected weights that fit {path}/config.json: {error}"
            ) from error
        model = cls(made)
        load_weights(model, weights)
        return load_adapter_(model, path) if has_adapter(path) else model


def with_overrides(model: PretrainedModel, overrides: dict[str, Any]) -> PretrainedModel:
    """The model with other fields in its config, and the same weights.

    Raises:
        ValueError: a field that there is not, or one that the weights do not fit.
    """
    if not overrides:
        return model
    other = type(model)(type(model.config).from_dict(vars(model.config) | overrides))
    if model.adapted is not None:
        adapt_(other, model.adapted.config)
    load_weights(other, model.state_dict())
    return other


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set all modules to eval mode inside; each is in its own mode again after it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
