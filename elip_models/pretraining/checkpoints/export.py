"""Export of our models to folders of other libraries: weights and config.

    hf          CLIPModel
    open_clip   open_clip_config.json and open_clip_model.safetensors, for CLIP
    ours        the files of `save_pretrained`

Not exported are schedules and, for transformers, the bias of CLIP's sigmoid loss, which does not
change a ranking.
"""

import os
from pathlib import Path
from typing import Any

from torch import nn

from elip_models.images import CLIP_MEAN, CLIP_STD
from elip_models.pretraining.checkpoints.load import match_leading_dims
from elip_models.pretraining.checkpoints.model_config import OPEN_CLIP_CONFIG
from elip_models.pretraining.checkpoints.names import KINDS
from elip_models.pretraining.checkpoints.renaming import rename_tensors, reversed_names
from elip_models.pretraining.models.base import PretrainedModel
from elip_models.pretraining.models.clip.model import INITIAL_BIAS, CLIPConfig
from elip_models.saving.files import write_json, write_tensors
from elip_models.saving.saved_folder import saved_folder
from elip_models.validation import require_extra

FORMATS = ("ours", "hf", "open_clip")


def save_as(
    model: PretrainedModel, folder: str | os.PathLike, to: str, *, tokenizer: Any = None
) -> Path:
    """Write a model for another library; an error leaves no incomplete folder.

    Args:
        model: one of our models; only CLIP can be written in another format than 'ours'.
        folder: a new or empty folder.
        to: one of `FORMATS`.
        tokenizer: tokenizer of transformers, written beside the weights.

    Returns:
        The folder.

    Raises:
        ValueError: the folder is not empty, the format is unknown, or the library has no class for
            the model.
    """
    folder = Path(folder)
    if to not in FORMATS:
        raise ValueError(f"to: expected one of {', '.join(FORMATS)}, got {to!r}")
    if to != "ours" and model.family != "clip":
        raise ValueError(
            f"to: expected 'ours' for {type(model).__name__}, since other libraries have no class "
            f"of it that ours is exported to, got {to!r}"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder: expected a new or empty folder, got {folder}")
    if to == "ours":
        return model.save_pretrained(folder, tokenizer)
    theirs = to_hf(model) if to == "hf" else to_open_clip(model)
    with saved_folder(folder) as staged:
        if to == "hf":
            theirs.save_pretrained(staged)
        else:
            _write_open_clip(theirs, model.config, staged, has_tokenizer=tokenizer is not None)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
    return folder


def to_hf(model: PretrainedModel) -> nn.Module:
    """Return the CLIPModel of transformers with the weights of our CLIP, in eval mode."""
    from transformers import CLIPConfig as HFConfig
    from transformers import CLIPModel

    config = model.config
    if config.eos_token_id == 2:
        raise ValueError(
            "eos_token_id: expected an id other than 2 for transformers' CLIP, which then pools at "
            "the highest id of a text, got 2; export to open_clip instead"
        )
    vision = {
        "hidden_size": config.vision_width,
        "intermediate_size": int(config.vision_width * config.vision_mlp_ratio),
        "num_hidden_layers": config.vision_depth,
        "num_attention_heads": config.vision_heads,
        "layer_norm_eps": config.vision_norm_eps,
        "hidden_act": config.activation,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "projection_dim": config.embed_dim,
    }
    text = config.text.to_dict() | {"projection_dim": config.embed_dim}
    theirs = CLIPModel(
        HFConfig(vision_config=vision, text_config=text, projection_dim=config.embed_dim)
    )
    return _with_our_weights(theirs, model, "hf_clip")


def to_open_clip(model: PretrainedModel) -> nn.Module:
    """Return the CLIP of open_clip with the weights of our CLIP, in eval mode."""
    with require_extra("save_as"):
        import open_clip

    return _with_our_weights(open_clip.CLIP(**open_clip_config(model.config)), model, "open_clip")


def _with_our_weights(theirs: nn.Module, model: PretrainedModel, kind: str) -> nn.Module:
    state = theirs.state_dict()
    weights = rename_tensors(model.state_dict(), reversed_names(KINDS[kind].names))
    known = state.keys() & weights.keys()
    theirs.load_state_dict({n: match_leading_dims(weights[n], state[n].shape) for n in known})
    return theirs.eval()


def open_clip_config(config: CLIPConfig) -> dict[str, Any]:
    """Return `model_cfg` of open_clip, with pooling of texts at the highest id or else at EOS."""
    vision, text = (
        {
            "width": getattr(config, f"{part}_width"),
            "layers": getattr(config, f"{part}_depth"),
            "mlp_ratio": getattr(config, f"{part}_mlp_ratio"),
            "norm_kwargs": {"eps": getattr(config, f"{part}_norm_eps")},
        }
        for part in ("vision", "text")
    )
    vision |= {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "head_width": config.vision_width // config.vision_heads,
    }
    text |= {
        "heads": config.text_heads,
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "pad_id": config.pad_token_id,
        "pool_type": "argmax" if config.eos_token_id == config.vocab_size - 1 else "eos",
        "eos_id": config.eos_token_id,
    }
    return {
        "embed_dim": config.embed_dim,
        "quick_gelu": config.activation == "quick_gelu",
        "init_logit_bias": INITIAL_BIAS if config.loss == "sigmoid" else None,
        "vision_cfg": vision,
        "text_cfg": text,
    }


def _write_open_clip(
    theirs: nn.Module, config: CLIPConfig, folder: Path, *, has_tokenizer: bool
) -> None:
    write_tensors(folder / "open_clip_model.safetensors", theirs.state_dict())
    model = open_clip_config(config)
    if has_tokenizer:
        model["text_cfg"]["hf_tokenizer_name"] = "."  # open_clip reads the folder itself
    images = {"mean": CLIP_MEAN, "std": CLIP_STD}
    if config.resize == "squash":
        images["resize_mode"] = "squash"
    write_json(folder / OPEN_CLIP_CONFIG, {"model_cfg": model, "preprocess_cfg": images})
