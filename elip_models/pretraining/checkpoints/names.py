"""Tables of tensor names: those of other checkpoints, and ours.

A table has templates of `renaming.py`, the other checkpoint's on the left, ours on the right. The
reversed table is for export; where two names on the left have one on the right, it has the first.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from elip_models.pretraining.checkpoints.renaming import QKV, Names


def _with_prefix(theirs: str, ours: str, names: Names) -> Names:
    return {theirs + left: ours + right for left, right in names.items()}


BERT = {"embeddings.*": "embeddings.*", "encoder.layer.*": "layers.*"}
OPEN_CLIP_VIT = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1.weight": "patch_embed.proj.weight",
    "ln_pre.*": "norm_pre.*",
    "ln_post.*": "norm.*",
    "transformer.resblocks.*.ln_1.*": "blocks.*.norm1.*",
    "transformer.resblocks.*.ln_2.*": "blocks.*.norm2.*",
    "transformer.resblocks.*.attn.in_proj_*": "blocks.*.attn.qkv.*",
    "transformer.resblocks.*.attn.out_proj.*": "blocks.*.attn.proj.*",
    "transformer.resblocks.*.mlp.c_fc.*": "blocks.*.mlp.fc1.*",
    "transformer.resblocks.*.mlp.c_proj.*": "blocks.*.mlp.fc2.*",
}
OPEN_CLIP_TEXT = {
    "token_embedding.weight": "text.transformer.embeddings.token_embedding.weight",
    "positional_embedding": "text.transformer.embeddings.position_embedding.weight",
    "ln_final.*": "text.transformer.final_layer_norm.*",
    "text_projection": "text_projection.weight.T",
    **_with_prefix(
        "transformer.resblocks.*.",
        "text.transformer.encoder.layers.*.",
        {
            "ln_1.*": "layer_norm1.*",
            "ln_2.*": "layer_norm2.*",
            "attn.in_proj_*": f"self_attn.{QKV}_proj.*",
            "attn.out_proj.*": "self_attn.out_proj.*",
            "mlp.c_fc.*": "mlp.fc1.*",
            "mlp.c_proj.*": "mlp.fc2.*",
        },
    ),
}
OPEN_CLIP = {
    **_with_prefix("visual.", "visual.", OPEN_CLIP_VIT),
    "visual.proj": "image_projection.weight.T",
    **OPEN_CLIP_TEXT,
    **_with_prefix("text.", "", OPEN_CLIP_TEXT),  # of open_clip's CustomTextCLIP
}
HF_VIT = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding.weight": "pos_embed",
    "embeddings.patch_embedding.*": "patch_embed.proj.*",
    "pre_layrnorm.*": "norm_pre.*",
    "post_layernorm.*": "norm.*",
    "encoder.layers.*.layer_norm1.*": "blocks.*.norm1.*",
    "encoder.layers.*.layer_norm2.*": "blocks.*.norm2.*",
    "encoder.layers.*.mlp.*": "blocks.*.mlp.*",
    f"encoder.layers.*.self_attn.{QKV}_proj.*": "blocks.*.attn.qkv.*",
    "encoder.layers.*.self_attn.out_proj.*": "blocks.*.attn.proj.*",
}
HF_CLIP = {
    **_with_prefix("vision_model.", "visual.", HF_VIT),
    "text_model.*": "text.transformer.*",
    "visual_projection.weight": "image_projection.weight",
}
PROJECTIONS = {
    "vision_proj.*": "encoders.image_projection.*",
    "text_proj.*": "encoders.text_projection.*",
}
BLIP_TEXT = _with_prefix("text_encoder.", "encoders.text.", BERT)
DECODER = {
    **_with_prefix("text_decoder.bert.", "decoder.", BERT),
    "text_decoder.cls.*": "language_head.*",
}


def _with_momentum_copies(names: Names) -> Names:
    copies = {
        left.replace(".", "_m.", 1): right.replace("encoders.", "encoders_m.", 1)
        for left, right in names.items()
    }
    return names | copies


SHARED = {
    **_with_momentum_copies({"visual_encoder.*": "encoders.visual.*", **PROJECTIONS}),
    "temp": "temperature",
    "image_queue": "queue.image",
    "text_queue": "queue.text",
    "queue_ptr": "queue.pointer",
    "ptr_queue": "queue.pointer",
}
ALBEF_TEXT = {
    **_with_prefix("text_encoder.bert.", "encoders.text.", BERT),
    **_with_prefix("text_encoder.", "encoders.text.", BERT),  # after fine-tuning
    "text_encoder.cls.*": "encoders.language_head.*",
}
ALBEF = SHARED | _with_momentum_copies(ALBEF_TEXT)
BLIP = SHARED | _with_momentum_copies(BLIP_TEXT) | DECODER
METER = {
    **_with_prefix("vit_model.visual.", "visual.", OPEN_CLIP_VIT),
    **_with_prefix("text_transformer.", "text.", BERT),
    "cross_modal_text_transform.*": "text_transform.*",
    "cross_modal_image_transform.*": "image_transform.*",
    "cross_modal_text_layers.*": "text_layers.layers.*",
    "cross_modal_image_layers.*": "image_layers.layers.*",
    "cross_modal_text_pooler.*": "text_pooler.*",
    "cross_modal_image_pooler.*": "image_pooler.*",
    "token_type_embeddings.weight": "token_types.weight",
    "mlm_score.*": "language_head.predictions.*",
    "itm_score.fc.*": "itm_head.*",
}
NOT_LOADED = (
    *("*position_ids", "idx_queue", "*attn_mask"),
    *("input_resolution", "context_length", "vocab_size"),  # of OpenAI's CLIP
    *("text_transformer.pooler.*", "vit_model.visual.proj"),  # of METER, as the following
    *(f"vit_model.{name}" for name in (*OPEN_CLIP_TEXT, "transformer.*", "logit_scale")),
)
"""Patterns of tensors of checkpoints that our models do not have."""


class Kind(NamedTuple):
    """A kind of checkpoint: our family, its table of names, and patterns of names that it has."""

    family: str
    names: Names
    has: tuple[str, ...]


KINDS = {
    "albef": Kind("albef", ALBEF, ("visual_encoder.*", "text_encoder.*token_type_embeddings.*")),
    "blip": Kind("blip", BLIP, ("visual_encoder.*",)),
    "meter": Kind("meter", METER, ("vit_model.visual.conv1.weight",)),
    "open_clip": Kind("clip", OPEN_CLIP, ("visual.class_embedding", "*token_embedding.weight")),
    "hf_clip": Kind("clip", HF_CLIP, ("vision_model.pre_layrnorm.*", "text_model.*")),
}
"""The kinds by name; a checkpoint is of the first one whose patterns all match."""
MOMENTUM: dict[str, str | None] = {"encoders_m.": "encoders.", "queue.": None}
FILLS: dict[str, dict[str, str | None]] = {
    "albef": {
        "encoders.language_head.": None,
        **MOMENTUM,
        "encoders_m.language_head.": "encoders.language_head.",
    },
    "blip": {
        "encoders.text.": "decoder.",
        "decoder.": "encoders.text.",
        **dict.fromkeys(("language_head.", "itm_head.", "temperature")),
        **dict.fromkeys(("encoders.image_projection.", "encoders.text_projection.")),
        **MOMENTUM,
    },
}
"""Family -> prefix of a part that a checkpoint may lack as a whole, if it is for inference or for a
task, and the prefix of the part that is copied into it, or None, which keeps the initial values."""


def recognise_kind(names: Iterable[str]) -> str:
    """Return the kind of a checkpoint by its tensor names; an unknown one raises ValueError."""
    names = list(names)
    for kind, (_, _, patterns) in KINDS.items():
        if all(any(fnmatchcase(name, pattern) for name in names) for pattern in patterns):
            return kind
    raise ValueError(
        f"source: expected a checkpoint of one of the kinds {', '.join(KINDS)}, got names such as "
        f"{', '.join(sorted(names)[:3])}"
    )
