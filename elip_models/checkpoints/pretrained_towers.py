"""A fresh model from pretrained towers: an image tower of timm, a text tower of transformers.

Position embeddings are interpolated to the model's image size, and the head is dropped. Layers of
the text go in order; cross-attention, which such towers lack, stays as initialised, and so do the
last rows of a vocabulary that is longer than theirs. ALBEF and BLIP take the language head too,
where the text tower has one, and BLIP's decoder begins as its encoder. Momentum copies are made
equal to the online parts again.
"""

from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import BertModel, RobertaModel
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

from elip_models.checkpoints.load import resample_pos_embed
from elip_models.checkpoints.names import BERT
from elip_models.checkpoints.renaming import rename_tensors
from elip_models.models.base import PretrainedModel
from elip_models.models.io.open_model import open_model
from elip_models.models.io.weights import load_weights


class _Towers(NamedTuple):
    """Where a family keeps its towers, as its names begin.

    visual: the image tower. texts: the text tower, and what begins as a copy of it; none where no
    text tower of BERT's kind fits. head: the language head, where one of a text model fits. spare:
    blocks that a pretrained image tower may have more, which are dropped. dropped: what a text
    tower has and the family has not.
    """

    visual: str
    texts: tuple[str, ...] = ()
    head: str | None = None
    spare: int = 0
    dropped: tuple[str, ...] = ("pooler.",)


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


class _Part(NamedTuple):
    """Weights by our names, and how those begin that they have to fill."""

    weights: dict[str, Tensor]
    parts: tuple[str, ...]


def load_pretrained_towers_(
    model: PretrainedModel,
    vision: str | VisionTransformer | None = None,
    text: str | nn.Module | None = None,
) -> None:
    """Overwrite towers of a fresh model, in place.

    Args:
        vision: 'timm:NAME', or a VisionTransformer of timm. For METER it may have one block more,
            the last, which is dropped.
        text: 'hf:NAME' or 'hf:FOLDER', or a BertModel or RobertaModel of transformers, alone or
            below a language head. Not for CLIP, whose text tower is another.

    Raises:
        TypeError: something else.
        ValueError: a tower of another architecture or size; the model is unchanged then.
    """
    found = [_of_image(model, vision)] if vision is not None else []
    found += [_of_text(model, text)] if text is not None else []
    weights = {name: weight for part in found for name, weight in part.weights.items()}
    parts = tuple(start for part in found for start in part.parts)
    others = [name for name in model.state_dict() if not name.startswith(parts)]
    load_weights(model, weights, allow_missing=(*others, "*.crossattention.*"))
    model.reset_momentum_()


def _of_image(model: PretrainedModel, vision: str | VisionTransformer) -> _Part:
    theirs = open_model(_checked("vision", vision, "timm:")) if isinstance(vision, str) else vision
    if type(theirs) is not VisionTransformer:
        raise TypeError(
            "vision: expected 'timm:NAME' or a VisionTransformer of timm, got "
            f"{type(theirs).__name__}"
        )
    start, ours = TOWERS[model.family].visual, model.visual
    depth, blocks = len(ours.blocks), len(theirs.blocks)
    if 0 < blocks - depth <= TOWERS[model.family].spare:
        blocks = depth
    _check_alike("vision", _vit(ours), _vit(theirs) | {"blocks": blocks})
    weights = {
        start + name: weight
        for name, weight in theirs.state_dict().items()
        if not name.startswith(("head.", f"blocks.{depth}."))
    }
    positions = f"{start}pos_embed"
    if positions in weights:
        weights[positions] = resample_pos_embed(weights[positions], model)
    return _Part(weights, (start,))


def _of_text(model: PretrainedModel, text: str | nn.Module) -> _Part:
    towers = TOWERS[model.family]
    if not towers.texts:
        raise ValueError(f"text: expected None for {type(model).__name__}, got {text!r:.80}")
    theirs = _open_text(_checked("text", text, "hf:")) if isinstance(text, str) else text
    base = getattr(theirs, getattr(theirs, "base_model_prefix", ""), theirs)
    if not isinstance(base, (BertModel, RobertaModel)):
        raise TypeError(
            "text: expected 'hf:NAME', or a BertModel or RobertaModel of transformers, got "
            f"{type(theirs).__name__}"
        )
    tower = model.get_submodule(towers.texts[0].removesuffix("."))
    roberta = isinstance(tower.embeddings, RobertaEmbeddings)
    kinds = ["roberta" if it else "bert" for it in (roberta, isinstance(base, RobertaModel))]
    _check_alike("text", _bert(tower.config, kinds[0]), _bert(base.config, kinds[1]))
    named = rename_tensors(base.state_dict(), BERT)
    starts = towers.texts
    weights = {
        part + name: weight
        for part in starts
        for name, weight in named.items()
        if not name.startswith(towers.dropped)
    }
    if towers.head is not None and hasattr(theirs, "cls"):
        predictions = theirs.cls.predictions.state_dict()
        weights |= {f"{towers.head}predictions.{name}": w for name, w in predictions.items()}
        starts += (towers.head,)
    return _Part(_with_our_rows(model, weights, base.config.vocab_size), starts)


def _with_our_rows(
    model: PretrainedModel, weights: dict[str, Tensor], rows: int
) -> dict[str, Tensor]:
    """What has a row a token, followed by the model's own last rows where its vocabulary is longer.

    Raises:
        ValueError: the model's vocabulary is shorter.
    """
    ours = model.config.vocab_size
    if rows > ours:
        raise ValueError(f"text: expected at most vocab_size = {ours} tokens, got {rows}")
    state = model.state_dict()
    ends = ("word_embeddings.weight", "predictions.bias", "decoder.bias", "decoder.weight")
    return {
        name: torch.cat([weight, state[name][rows:]]) if name.endswith(ends) else weight
        for name, weight in weights.items()
    }


def _checked(argument: str, name: str, prefix: str) -> str:
    if not name.startswith(prefix):
        raise ValueError(f"{argument}: expected '{prefix}NAME' or a module, got {name!r}")
    return name


def _open_text(spec: str) -> nn.Module:
    """The model of transformers, with its language head where its config names one."""
    from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

    name = spec.removeprefix("hf:")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        has_head = any(one.endswith("ForMaskedLM") for one in config.architectures or ())
        kind = AutoModelForMaskedLM if has_head else AutoModel
        return kind.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        raise ValueError(
            f"text: expected a model whose files are here or can be fetched, got {spec!r}: {error}"
        ) from error


def _vit(vit: VisionTransformer) -> dict[str, Any]:
    """What two image towers have to have in common, beside the names of their tensors."""
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


def _bert(config: Any, kind: str) -> dict[str, Any]:
    """What two text towers have to have in common, beside the names of their tensors."""
    return {
        "kind": kind,
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "hidden": config.intermediate_size,
        "positions": config.max_position_embeddings,
        "activation": config.hidden_act,
        "eps": config.layer_norm_eps,
    }


def _check_alike(argument: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    differing = [name for name in ours if ours[name] != theirs[name]]
    if differing:
        expected, got = (
            ", ".join(f"{name} = {values[name]!r}" for name in differing)
            for values in (ours, theirs)
        )
        raise ValueError(f"{argument}: expected a tower of the model's {expected}, got {got}")
