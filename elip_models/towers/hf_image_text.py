"""Language-image models of Hugging Face transformers: CLIP, SigLIP, and BLIP for retrieval."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoTokenizer, BlipForImageTextRetrieval, CLIPModel, SiglipModel

from elip_models.images import CLIP_STATS, Stats
from elip_models.towers.hf_processor import image_stats_of
from elip_models.towers.reducible_model import (
    ImageTextModel,
    check_tokenizer_in,
    default_stats,
    random_ids,
)
from elip_models.towers.wrapped_modules import affine


class HFImageText(ImageTextModel):
    """A language-image model of transformers.

    kind: the model's class.
    mask_position: the index of attention_mask among the arguments after ids and pixels.
    pairing: the index there, the name and the default of the argument that asks for an output
        about text i and image i together.
    reads_padding: texts are padded to the full length and have no mask.
    """

    kind: ClassVar[type[nn.Module]]
    mask_position: ClassVar[int] = 0
    pairing: ClassVar[tuple[int, str, bool]] = (2, "return_loss", False)
    reads_padding: ClassVar[bool] = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.image_model = model.vision_model

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        return isinstance(model, cls.kind)

    @property
    def saved_config(self) -> Any:
        """Return the config that transformers saves with the model."""
        return self.model.config

    def _refuses_width(self, text: int) -> str | None:
        vision = self.model.config.vision_config.hidden_size
        return None if text == vision else f"its text is {text} wide, its image tower {vision}"

    def images_and_text(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        at = self.mask_position
        mask = args[at] if len(args) > at else kwargs.get("attention_mask")
        return pixel_values, {"input_ids": input_ids, "attention_mask": mask}

    def pairs(self, *args: Any, **kwargs: Any) -> bool:
        at, name, default = self.pairing
        return bool(args[2 + at] if len(args) > 2 + at else kwargs.get(name, default))

    def encode_guidance(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        features = self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
        return features.pooler_output

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        text = self.model.config.text_config
        sizes = text.max_position_embeddings, text.vocab_size, text.eos_token_id
        return {"pixel_values": images, "input_ids": random_ids(images, *sizes)}

    def image_stats(self) -> Stats:
        return image_stats_of(self.model) or default_stats(self.model, "CLIP", CLIP_STATS)

    def load_tokenizer(self, name: str) -> Any:
        if Path(name).is_dir():
            check_tokenizer_in(Path(name))
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)

    def tokenise(self, tokenizer: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        longest = self.model.config.text_config.max_position_embeddings
        text = tokenizer(
            list(captions),
            padding="max_length" if self.reads_padding else True,
            truncation=True,
            max_length=longest if self.reads_padding else min(longest, tokenizer.model_max_length),
            return_tensors="pt",
        )
        names = ("input_ids",) if self.reads_padding else ("input_ids", "attention_mask")
        return {name: text[name] for name in names}

    def tracing(self) -> AbstractContextManager:
        """Return a mode for masks, of which transformers asks whether they hide a token."""
        return MasksWithoutValues()


class MasksWithoutValues(TorchFunctionMode):
    """A mode in which a meta tensor is False, so that no mask is left out."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch."""
        if func is Tensor.__bool__ and args[0].is_meta:
            return False
        return func(*args, **kwargs or {})


class HFClip(HFImageText):
    """CLIPModel, guided by its text features mapped back to the vision width."""

    kind = CLIPModel

    def encode_guidance(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        features = super().encode_guidance(input_ids, attention_mask)
        return through_transpose(F.normalize(features, dim=-1), self.model.visual_projection)


class HFSiglip(HFImageText):
    """SiglipModel, guided by its text features, which are as wide as its image tower.

    They are the features of the last token, which may be padding: texts are padded to the full
    length, as in training.
    """

    kind = SiglipModel
    reads_padding = True

    def refuses(self) -> str | None:
        return self._refuses_width(self.model.config.text_config.projection_size)


class HFBlip(HFImageText):
    """BlipForImageTextRetrieval, guided by BERT's CLS output.

    In its call, use_itm_head comes before attention_mask. With this head, which is the default,
    text i reads image i. Without it, all texts are compared with all images.
    """

    kind = BlipForImageTextRetrieval
    mask_position = 1
    pairing = (0, "use_itm_head", True)
    reads_patches = True  # its text encoder attends to them

    def refuses(self) -> str | None:
        return self._refuses_width(self.model.config.text_config.hidden_size)

    def encode_guidance(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        text = self.model.text_encoder(input_ids=input_ids, attention_mask=attention_mask)
        return text.last_hidden_state[:, 0]


def through_transpose(x: Tensor, layer: nn.Module) -> Tensor:
    """Return x W, (B, out) -> (B, in), for a layer without bias.

    Without a readable weight, W comes from a call on each input feature.
    """
    known = affine(layer)
    if known is not None:
        return x @ known.weight
    return x @ layer(torch.eye(layer.in_features, dtype=x.dtype, device=x.device)).T
