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
from transformers import BertModel, RobertaModel
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

from elip_models.pretraining.checkpoints.load import resample_pos_embed
from elip_models.pretraining.checkpoints.names import BERT
from elip_models.pretraining.checkpoints.renaming import rename_tensors
from elip_models.pretraining.models.base import PretrainedModel
from elip_models.saving.open_model import (
    missing_files_as_value_error,
    open_model,
    split_spec,
)
from elip_models.saving.weights import load_weights


class _Towers(NamedTuple):
    """Prefixes of the names of a family's towers."""

    visual: str
    texts: tuple[str, ...] = ()  # text tower, and its copies; empty if no BERT-like tower fits
    head: str | None = None  # if the head of a text model fits
    spare: int = 0  # number of last blocks of a pretrained image tower that are dropped
    dropped: tuple[str, ...] = ("pooler.",)  # parts of a text tower that the family lacks


TOWERS = {
    "clip": _Towers("visual."),
    "albef": _Towers("encoders.visual.", ("encoders.text.",), "encoders.language_head."),
    "blip": _Towers(
        "encoders.visual.",
        ("encoders.text.", "decoder."),
        "language_head.",
        dropped=("pooler.", "embeddings.token_type_"),
    ),
    "meter": _Towers("visual.", ("text.",), spare=1),
}


_Part = tuple[dict[str, Tensor], tuple[str, ...]]
"""Weights under our names, and the prefixes of the parts that they must fill."""


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
    found = [_image_weights(model, vision)] if vision is not None else []
    found += [_text_weights(model, text)] if text is not None else []
    weights = {name: weight for part, _ in found for name, weight in part.items()}
    filled = tuple(prefix for _, prefixes in found for prefix in prefixes)
    others = [name for name in model.state_dict() if not name.startswith(filled)]
    load_weights(model, weights, allow_missing=(*others, "*.crossattention.*"))
    model.reset_momentum_()


def _image_weights(model: PretrainedModel, vision: str | VisionTransformer) -> _Part:
    if isinstance(vision, str) and not vision.startswith("timm:"):
        raise ValueError(f"vision: expected 'timm:NAME' or a module, got {vision!r}")
    theirs = open_model(vision) if isinstance(vision, str) else vision
    if type(theirs) is not VisionTransformer:
        raise TypeError(
            "vision: expected 'timm:NAME' or a VisionTransformer of timm, got "
            f"{type(theirs).__name__}"
        )
    start, ours = TOWERS[model.family].visual, model.visual
    depth, blocks = len(ours.blocks), len(theirs.blocks)
    if 0 < blocks - depth <= TOWERS[model.family].spare:
        blocks = depth
    _check_equal("vision", _vit_settings(ours), _vit_settings(theirs) | {"blocks": blocks})
    weights = {
        start + name: weight
        for name, weight in theirs.state_dict().items()
        if not name.startswith(("head.", f"blocks.{depth}."))
    }
    positions = f"{start}pos_embed"
    if positions in weights:
        weights[positions] = resample_pos_embed(weights[positions], model)
    return weights, (start,)


def _text_weights(model: PretrainedModel, text: str | nn.Module) -> _Part:
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
    tower = model.get_submodule(towers.texts[0].removesuffix("."))
    _check_equal("text", _bert_settings(tower), _bert_settings(base))
    renamed = rename_tensors(base.state_dict(), BERT)
    starts = towers.texts
    weights = {
        part + name: weight
        for part in starts
        for name, weight in renamed.items()
        if not name.startswith(towers.dropped)
    }
    if towers.head is not None and hasattr(theirs, "cls"):
        predictions = theirs.cls.predictions.state_dict()
        weights |= {f"{towers.head}predictions.{name}": w for name, w in predictions.items()}
        starts += (towers.head,)
    return _with_new_rows(model, weights, base.config.vocab_size), starts


def _with_new_rows(
    model: PretrainedModel, weights: dict[str, Tensor], rows: int
) -> dict[str, Tensor]:
    """Append the model's own last rows to tensors with one row per token."""
    ours = model.config.vocab_size
    if rows > ours:
        raise ValueError(f"text: expected at most vocab_size = {ours} tokens, got {rows}")
    state = model.state_dict()
    ends = ("word_embeddings.weight", "predictions.bias", "decoder.bias", "decoder.weight")
    return {
        name: torch.cat([weight, state[name][rows:]]) if name.endswith(ends) else weight
        for name, weight in weights.items()
    }


def _open_text(spec: str) -> nn.Module:
    """Load a model of transformers, with a language head if its config names one."""
    from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

    library, name = split_spec(spec)
    if library != "hf":
        raise ValueError(f"text: expected 'hf:NAME' or a module, got {spec!r}")
    with missing_files_as_value_error("text", spec):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        has_head = any(one.endswith("ForMaskedLM") for one in config.architectures or ())
        kind = AutoModelForMaskedLM if has_head else AutoModel
        return kind.from_pretrained(name, trust_remote_code=False)


# What two towers must have in common beside the names of their tensors:
def _vit_settings(vit: VisionTransformer) -> dict[str, Any]:
    block = vit.blocks[0]
    return {
        "width": vit.embed_dim,
        "blocks": len(vit.blocks),
        "heads": block.attn.num_heads,
        "patch": tuple(vit.patch_embed.patch_size),
        "activation": type(block.mlp.act).__name__.lower(),
        "eps": block.norm1.eps,
        "pre_norm": isinstance(vit.norm_pre, nn.LayerNorm),
        "pool": vit.global_pool,
    }


def _bert_settings(tower: nn.Module) -> dict[str, Any]:
    config = tower.config
    return {
        "kind": "roberta" if isinstance(tower.embeddings, RobertaEmbeddings) else "bert",
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "hidden": config.intermediate_size,
        "positions": config.max_position_embeddings,
        "activation": config.hidden_act,
        "eps": config.layer_norm_eps,
    }


def _check_equal(argument: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    differing = [name for name in ours if ours[name] != theirs[name]]
    if differing:
        expected, got = (
            ", ".join(f"{name} = {values[name]!r}" for name in differing)
            for values in (ours, theirs)
        )
        raise ValueError(f"{argument}: expected a tower with the model's {expected}, got {got}")
