"""Export of our models to folders of other libraries: weights and config.

    hf          CLIPModel, or the class of transformers that `architecture` names, for BLIP
    open_clip   open_clip_config.json and open_clip_model.safetensors, for CLIP
    ours        the files of `save_pretrained`

Not exported are schedules, momentum copies, the queue, the parts of BLIP that an architecture lacks
and, for transformers, the bias of CLIP's sigmoid loss, which does not change a ranking.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from elip_models.images import CLIP_MEAN, CLIP_STD
from elip_models.pretraining.checkpoints.load import match_leading_dims
from elip_models.pretraining.checkpoints.model_config import OPEN_CLIP_CONFIG
from elip_models.pretraining.checkpoints.names import KINDS
from elip_models.pretraining.checkpoints.renaming import rename_tensors, reversed_names
from elip_models.pretraining.models.base import PretrainedModel
from elip_models.pretraining.models.blip.model import BLIPConfig
from elip_models.pretraining.models.clip.model import INITIAL_BIAS, CLIPConfig
from elip_models.saving.files import write_json, write_tensors
from elip_models.validation import require_extra

FORMATS = ("ours", "hf", "open_clip")
BLIP_ARCHITECTURES = {
    KINDS[kind].architecture: kind
    for kind in ("hf_blip_retrieval", "hf_blip_caption", "hf_blip_vqa")
}


def save_as(
    model: PretrainedModel,
    folder: str | os.PathLike,
    to: str,
    *,
    architecture: str | None = None,
    tokenizer: Any = None,
) -> Path:
    """Write a model for another library; an error leaves no incomplete folder.

    Args:
        model: one of our models.
        folder: a new or empty folder.
        to: one of `FORMATS`.
        architecture: for BLIP in transformers, one of `BLIP_ARCHITECTURES`; None: the first.
        tokenizer: tokenizer of transformers, written beside the weights.

    Returns:
        The folder.

    Raises:
        ValueError: the folder is not empty, the format or architecture is unknown, or the library
            has no class for the model.
    """
    if to not in FORMATS:
        raise ValueError(f"to: expected one of {', '.join(FORMATS)}, got {to!r}")
    if architecture is not None and (to, model.family) != ("hf", "blip"):
        raise ValueError(
            f"architecture: expected None except for BLIP and to='hf', got {architecture!r} for "
            f"{type(model).__name__} and to={to!r}"
        )
    with _new_folder(Path(folder)) as staged:
        if to == "ours":
            model.save_pretrained(staged, tokenizer)
            return Path(folder)
        if to == "hf":
            to_hf(model, architecture).save_pretrained(staged)
        else:
            _write_open_clip(model, staged, has_tokenizer=tokenizer is not None)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
    return Path(folder)


def to_hf(model: PretrainedModel, architecture: str | None = None) -> nn.Module:
    """Return a model of transformers with the weights of ours, in eval mode; see `save_as`."""
    import transformers

    if model.family not in HF_ARCHITECTURES:
        raise ValueError(
            f"to: expected 'ours' for {type(model).__name__}, which transformers has no class of, "
            "got 'hf'"
        )
    kinds, config_of = HF_ARCHITECTURES[model.family]
    architecture = architecture or next(iter(kinds))
    if architecture not in kinds:
        raise ValueError(f"architecture: expected one of {', '.join(kinds)}, got {architecture!r}")
    config = config_of(model.config)
    return _with_our_weights(
        getattr(transformers, architecture)(config), model, kinds[architecture]
    )


def _with_our_weights(theirs: nn.Module, model: PretrainedModel, kind: str) -> nn.Module:
    state = theirs.state_dict()
    weights = rename_tensors(model.state_dict(), reversed_names(KINDS[kind].names))
    known = state.keys() & weights.keys()
    theirs.load_state_dict({n: match_leading_dims(weights[n], state[n].shape) for n in known})
    return theirs.eval()


def _hf_clip_config(config: CLIPConfig) -> Any:
    from transformers import CLIPConfig as HFConfig

    if config.eos_token_id == 2:
        raise ValueError(
            "eos_token_id: expected an id other than 2 for transformers' CLIP, which then pools at "
            "the highest id of a text, got 2; export to open_clip instead"
        )
    shared = {"hidden_act": config.activation, "projection_dim": config.embed_dim}
    vision = shared | _hf_tower(config, "vision", config.vision_mlp_ratio)
    text = shared | _hf_tower(config, "text", config.text_mlp_ratio)
    text |= {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": None,
    }
    return HFConfig(vision_config=vision, text_config=text, projection_dim=config.embed_dim)


def _hf_blip_config(config: BLIPConfig) -> Any:
    from transformers import BlipConfig

    text = _hf_tower(config, "text", config.text_hidden / config.text_width) | {
        "intermediate_size": config.text_hidden,
        "encoder_hidden_size": config.vision_width,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "hidden_dropout_prob": config.text_dropout,
        "attention_probs_dropout_prob": config.text_dropout,
        "pad_token_id": config.pad_token_id,
        "sep_token_id": config.sep_token_id,
        "eos_token_id": config.sep_token_id,
        "bos_token_id": config.decoder_token_id,
    }
    vision = _hf_tower(config, "vision", config.vision_mlp_ratio)
    return BlipConfig(
        vision_config=vision | {"hidden_act": "gelu"},
        text_config=text | {"hidden_act": "gelu"},
        image_text_hidden_size=config.embed_dim,
        projection_dim=config.embed_dim,
    )


HF_ARCHITECTURES: dict[str, tuple[dict[str, str], Callable[[Any], Any]]] = {
    "clip": ({"CLIPModel": "hf_clip"}, _hf_clip_config),
    "blip": (BLIP_ARCHITECTURES, _hf_blip_config),
}
"""Family -> (architecture in transformers -> kind of names), and the conversion of the config."""


def _hf_tower(config: CLIPConfig | BLIPConfig, part: str, mlp_ratio: float) -> dict[str, Any]:
    width = getattr(config, f"{part}_width")
    sizes = {
        "hidden_size": width,
        "intermediate_size": int(width * mlp_ratio),
        "num_hidden_layers": getattr(config, f"{part}_depth"),
        "num_attention_heads": getattr(config, f"{part}_heads"),
        "layer_norm_eps": getattr(config, f"{part}_norm_eps"),
    }
    if part == "vision":
        sizes |= {"image_size": config.image_size, "patch_size": config.patch_size}
    return sizes


def open_clip_config(config: CLIPConfig) -> dict[str, Any]:
    """Return `model_cfg` of open_clip, with pooling of texts at the highest id or else at EOS."""
    towers: dict[str, dict[str, Any]] = {"vision": {}, "text": {}}
    for part, tower in towers.items():
        tower |= {
            "width": getattr(config, f"{part}_width"),
            "layers": getattr(config, f"{part}_depth"),
            "mlp_ratio": getattr(config, f"{part}_mlp_ratio"),
        }
        eps = getattr(config, f"{part}_norm_eps")
        tower |= {"norm_kwargs": {"eps": eps}} if eps != 1e-5 else {}
    towers["vision"] |= {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "head_width": config.vision_width // config.vision_heads,
    }
    towers["text"] |= {
        "heads": config.text_heads,
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "pad_id": config.pad_token_id,
    }
    if config.eos_token_id != config.vocab_size - 1:
        towers["text"] |= {"pool_type": "eos", "eos_id": config.eos_token_id}
    model = {
        "embed_dim": config.embed_dim,
        "quick_gelu": config.activation == "quick_gelu",
        "vision_cfg": towers["vision"],
        "text_cfg": towers["text"],
    }
    return model | ({"init_logit_bias": INITIAL_BIAS} if config.loss == "sigmoid" else {})


def _write_open_clip(model: PretrainedModel, folder: Path, *, has_tokenizer: bool) -> None:
    if model.family != "clip":
        raise ValueError(
            f"to: expected 'ours' for {type(model).__name__}, which open_clip has no class of, got "
            "'open_clip'"
        )
    with require_extra("save_as"):
        import open_clip
    config = open_clip_config(model.config)
    theirs = _with_our_weights(open_clip.CLIP(**config), model, "open_clip")
    write_tensors(folder / "open_clip_model.safetensors", theirs.state_dict())
    if has_tokenizer:
        config["text_cfg"]["hf_tokenizer_name"] = "."  # open_clip reads the folder itself
    images = {"mean": CLIP_MEAN, "std": CLIP_STD}
    if model.config.resize == "squash":
        images["resize_mode"] = "squash"
    write_json(folder / OPEN_CLIP_CONFIG, {"model_cfg": config, "preprocess_cfg": images})


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `folder` if no error occurs."""
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder: expected a new or empty folder, got {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        staged = temporary / folder.name
        staged.mkdir()
        yield staged
        os.replace(staged, folder)
    finally:
        shutil.rmtree(temporary)
