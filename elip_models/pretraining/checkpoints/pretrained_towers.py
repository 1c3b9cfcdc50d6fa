"""Initialisation from pretrained towers: an image tower of timm, a text tower of transformers.

Position embeddings are interpolated to the model's image size, and the image tower's head is
dropped. Text layers are copied in order. Cross-attention keeps its initial values, and so do the
last rows of a larger vocabulary. ALBEF and BLIP also take the text tower's language head, if it has
one. BLIP's decoder gets the same weights as its encoder. Momentum copies are reset to the online
parts.
"""

from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, BertModel, RobertaModel
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

from elip_models.pretraining.checkpoints.load import fit_weights
from elip_models.pretraining.checkpoints.names import BERT
from elip_models.pretraining.checkpoints.renaming import rename_tensors
from elip_models.pretraining.models.base import PretrainedModel
from elip_models.saving.open_model import missing_files_as_value_error, open_model
from elip_models.saving.weights import load_weights


class _Towers(NamedTuple):
    """Prefixes of the names of a family's towers."""

    visual: str
    texts: tuple[str, ...] = ()  # text tower, and its copies; empty if no BERT-like tower fits
    head: str | None = None  # if the head of a text model fits


TOWERS = {
    "clip": _Towers("visual."),
    "albef": _Towers("encoders.visual.", ("encoders.text.",), "encoders.language_head."),
    "blip": _Towers("encoders.visual.", ("encoders.text.", "decoder."), "language_head."),
    "meter": _Towers("visual.", ("text.",)),
}
ROW_PER_TOKEN = ("word_embeddings.weight", "predictions.bias", "decoder.bias", "decoder.weight")


def load_pretrained_towers_(
    model: PretrainedModel,
    vision: str | VisionTransformer | None = None,
    text: str | nn.Module | None = None,
) -> None:
    """Overwrite the towers of a new model in place by pretrained ones.

    Args:
        model: one of our models; its momentum copies are reset.
        vision: 'timm:NAME', or a VisionTransformer of timm. METER drops a twelfth block.
        text: 'hf:NAME' or 'hf:FOLDER', or a BertModel or RobertaModel of transformers, with or
            without language head. CLIP, which has another text tower, needs None.

    Raises:
        TypeError: a tower has another type.
        ValueError: a tower has another architecture or size. The model is unchanged then.
    """
    weights = {} if vision is None else _image_weights(model, vision)
    weights |= {} if text is None else _text_weights(model, text)
    towers = TOWERS[model.family]
    filled = () if vision is None else (towers.visual,)
    filled += () if text is None else towers.texts
    others = [name for name in model.state_dict() if not name.startswith(filled)]
    load_weights(model, weights, allow_missing=(*others, "*.crossattention.*"))
    model.reset_momentum_()


def _image_weights(model: PretrainedModel, vision: str | VisionTransformer) -> dict[str, Tensor]:
    if isinstance(vision, str) and not vision.startswith("timm:"):
        raise ValueError(f"vision: expected 'timm:NAME' or a module, got {vision!r}")
    theirs = open_model(vision) if isinstance(vision, str) else vision
    if type(theirs) is not VisionTransformer:
        raise TypeError(
            "vision: expected 'timm:NAME' or a VisionTransformer of timm, got "
            f"{type(theirs).__name__}"
        )
    _check_equal("vision", _vit_settings(model.visual), _vit_settings(theirs))
    prefix, dropped = TOWERS[model.family].visual, ("head.",)
    if model.family == "meter":
        dropped += (f"blocks.{len(model.visual.blocks)}.",)
    weights = {
        prefix + name: weight
        for name, weight in theirs.state_dict().items()
        if not name.startswith(dropped)
    }
    return fit_weights(model, weights)


def _text_weights(model: PretrainedModel, text: str | nn.Module) -> dict[str, Tensor]:
    towers = TOWERS[model.family]
    if not towers.texts:
        raise ValueError(f"text: expected None for {type(model).__name__}, got {text!r:.80}")
    theirs = _open_text(text) if isinstance(text, str) else text
    base = getattr(theirs, getattr(theirs, "base_model_prefix", ""), theirs)
    if not isinstance(base, (BertModel, RobertaModel)):
        raise TypeError(
            "text: expected 'hf:NAME', or a BertModel or RobertaModel of transformers, got "
            f"{type(theirs).__name__}"
        )
    ours = model.get_submodule(towers.texts[0].removesuffix("."))
    _check_equal("text", _bert_settings(ours), _bert_settings(base))
    dropped = ("pooler.", "embeddings.token_type_") if model.family == "blip" else "pooler."
    weights = {
        tower + name: weight
        for tower in towers.texts
        for name, weight in rename_tensors(base.state_dict(), BERT).items()
        if not name.startswith(dropped)
    }
    if towers.head is not None and hasattr(theirs, "cls"):
        head = theirs.cls.predictions.state_dict()
        weights |= {f"{towers.head}predictions.{name}": weight for name, weight in head.items()}
    state, rows = model.state_dict(), base.config.vocab_size
    return {
        name: torch.cat([weight, state[name][rows:]]) if name.endswith(ROW_PER_TOKEN) else weight
        for name, weight in weights.items()
    }


def _open_text(spec: str) -> nn.Module:
    """Load a model of transformers, with a language head if its config names one."""
    if not spec.startswith("hf:"):
        raise ValueError(f"text: expected 'hf:NAME' or a module, got {spec!r}")
    name = spec.removeprefix("hf:")
    with missing_files_as_value_error("text", spec):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        has_head = any(kind.endswith("ForMaskedLM") for kind in config.architectures or ())
        kind = AutoModelForMaskedLM if has_head else AutoModel
        return kind.from_pretrained(name, trust_remote_code=False)


def _check_equal(argument: str, ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
    """Raise ValueError for settings that differ and that no tensor shows."""
    if ours != theirs:
        raise ValueError(
            f"{argument}: expected a tower with heads, activation, epsilon and kind of the model, "
            f"{ours}, got {theirs}"
        )


def _vit_settings(vit: VisionTransformer) -> tuple[Any, ...]:
    block = vit.blocks[0]
    activation = type(block.mlp.act).__name__.lower()
    return block.attn.num_heads, activation, block.norm1.eps, vit.global_pool


def _bert_settings(tower: nn.Module) -> tuple[Any, ...]:
    config = tower.config
    kind = "roberta" if isinstance(tower.embeddings, RobertaEmbeddings) else "bert"
    return config.num_attention_heads, config.hidden_act, config.layer_norm_eps, kind
