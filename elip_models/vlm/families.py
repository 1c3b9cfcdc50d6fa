"""The multimodal language models of transformers that are supported, as a table.

All of them replace the placeholder tokens of images in the sequence of embeddings by features, and
then call one language model. A row names the language model; tests run every row.
"""

from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import nn

from elip_models.strategies.strategy import tower_of
from elip_models.towers import library_of, without_adapter
from elip_models.towers.nested_modules import modules_around, modules_outside
from elip_models.vlm.retrieval import embeds_tokens

LANGUAGE_MODEL = {
    **dict.fromkeys(
        (
            *("aria", "aya_vision", "cohere2_vision", "deepseek_vl", "ernie4_5_vl_moe"),
            *("exaone4_5", "fast_vlm", "gemma3", "gemma3n", "gemma4", "glm46v", "glm4v"),
            *("glm4v_moe", "glm_ocr", "glmga", "got_ocr2", "hyperclovax_vision_v2", "internvl"),
            *("janus", "kimi_k25", "lfm2_vl", "lighton_ocr", "llava", "llava_next"),
            *("llava_next_video", "llava_onevision", "mistral3", "molmo2", "ovis2"),
            *("paddleocr_vl", "paligemma", "perception_lm", "pp_chart2table", "qianfan_ocr"),
            *("qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe"),
            *("qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe", "shieldgemma2"),
            *("video_llama_3", "video_llava", "vipllava"),
        ),
        "language_model",
    ),
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), "text_model"),
    "llama4": "language_model.model",
}
"""The path of the language model inside the model, by `config.model_type`."""
CROSS_ATTENTION = {"mllama": "language_model"}
"""The same for models whose language model reads images by cross-attention."""
FAMILIES = LANGUAGE_MODEL | CROSS_ATTENTION
PATCH_TOKENS = {"deepseek_vl", "janus", "llava", "paligemma", "video_llava"}
"""The models whose image tokens are the patches of one layer of the image tower, one each."""
PATCH_ARGUMENTS = {
    *("exaone4_5", "glm_ocr", "hyperclovax_vision_v2", "qwen2_5_omni_thinker", "qwen2_5_vl"),
    *("qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe"),
}
"""The models whose image tower takes the positions and segments of patches as arguments."""
TOKEN_IDS = ("image_token_id", "video_token_id")
RECURRENT = {"conv", "linear_attention"}
"""The types of layers that read a sequence token by token, without a mask of pairs."""
LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"} | RECURRENT


@dataclass(frozen=True)
class Multimodal:
    """The parts of a multimodal language model.

    model: the module that puts image features into the sequence and calls the language model.
    language_model: the language model inside.
    head: the module that computes the loss, if there is one: a caller of `model`, or itself.
    embedder: the module that returns an embedding of each token, if there is one, likewise.
    """

    model: nn.Module
    language_model: nn.Module
    head: nn.Module | None
    embedder: nn.Module | None

    @property
    def config(self) -> Any:
        """Return the config of the whole model."""
        return self.model.config

    @property
    def text_config(self) -> Any:
        """Return the config of the language model."""
        return self.config.get_text_config()

    @property
    def tower(self) -> nn.Module:
        """Return the image model."""
        names = ("vision_tower", "vision_model", "visual", "image_tower", "vision_encoder")
        return next(getattr(self.model, name) for name in names if hasattr(self.model, name))

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        """Return the ids of the tokens that images and videos replace."""
        ids = (getattr(self.config, name, None) for name in TOKEN_IDS)
        return tuple(token_id for token_id in ids if token_id is not None)

    @property
    def cross_attention_layers(self) -> tuple[int, ...]:
        """Return the layers of the language model that read images by cross-attention, if any."""
        if self.config.model_type not in CROSS_ATTENTION:
            return ()
        return tuple(self.text_config.cross_attention_layers)

    @property
    def window(self) -> int | None:
        """Return how long a sequence may be whose tokens attend to all before them, or None.

        A longer one exceeds the window or the chunk of a layer.
        """
        config = self.text_config
        types = getattr(config, "layer_types", None) or ["sliding_attention"]
        limits = [
            getattr(config, name, None)
            for kind, name in (
                ("sliding_attention", "sliding_window"),
                ("chunked_attention", "attention_chunk_size"),
            )
            if kind in types
        ]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def longest(self) -> int | None:
        """Return how long a sequence may be for which attention has one temperature, or None."""
        config = self.text_config
        is_tuned = getattr(config, "attn_temperature_tuning", False)
        return config.floor_scale - 1 if is_tuned else None

    @property
    def recurrent_layers(self) -> tuple[int, ...]:
        """Return the layers of the language model that read a sequence token by token."""
        types = getattr(self.text_config, "layer_types", None) or ()
        return tuple(i for i, kind in enumerate(types) if kind in RECURRENT)

    @property
    def why_tokens_must_stay(self) -> str | None:
        """Return why no token can be removed before the language model's layers, or None."""
        unknown = set(getattr(self.text_config, "layer_types", None) or ()) - LAYER_TYPES
        if unknown:
            kinds = ", ".join(sorted(unknown))
            return f"its language model has layers of type {kinds}, whose state counts every token"
        if "position_ids" not in signature(self.language_model.forward).parameters:
            name = type(self.language_model).__name__
            return (
                "it needs a language model that takes position_ids, which remaining tokens keep, "
                f"in place of {name}"
            )
        return None


def find_multimodal(model: Any) -> Multimodal | None:
    """Return the parts of a multimodal language model, or None if the model is another.

    A language model that another model contains, such as the teacher of an image model, is none of
    its parts.
    """
    model = without_adapter(model)
    if library_of(model) != "transformers":
        return None
    trunk = _trunk_of(model)
    parents = {child: module for module in model.modules() for child in module.children()}
    for module in model.modules():
        if module is trunk:
            return None
        kind = getattr(getattr(module, "config", None), "model_type", None)
        name, *inner = FAMILIES.get(kind, "").split(".")
        part = dict(module.named_children()).get(name)
        if part is not None:
            head = module if inner else parents.get(module)
            embedder = next(filter(embeds_tokens, modules_around(model, module)), None)
            return Multimodal(module, part.get_submodule(".".join(inner)), head, embedder)
    return None


def own_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a multimodal language model without those of models inside it."""
    model = without_adapter(model)
    around = modules_around(model, find_multimodal(model).model)
    return modules_outside(model, lambda m: m not in around and find_multimodal(m) is not None)


def _trunk_of(model: nn.Module) -> nn.Module | None:
    """Return the module with the blocks of the model's image tower, or None if it has none."""
    try:
        return tower_of(model).trunk
    except TypeError:
        return None


def unsupported_config(model: nn.Module) -> Any:
    """Return the config of a model without a row here that has image tokens in its prompt, or None.

    The model is one of which `find_multimodal` has returned None.
    """
    trunk = _trunk_of(model)
    modules = model.modules() if trunk is None else modules_around(model, trunk)
    configs = (getattr(module, "config", None) for module in modules)
    return next((c for c in configs if getattr(c, "image_token_id", None) is not None), None)


def refuse_multimodal(model: nn.Module) -> None:
    """Raise TypeError if the model is a multimodal language model, where an image model is meant.

    The message has the name of its image tower.
    """
    if (multimodal := find_multimodal(model)) is not None:
        tower = next(name for name, module in model.named_modules() if module is multimodal.tower)
        raise TypeError(
            "model: expected an image model or an image-text model, got a multimodal language "
            f"model, {type(model).__name__}; use its image tower, model.{tower}"
        )
