"""Tables of tensor names: those of other checkpoints, and ours.

A table has templates of `renaming.py`, the other checkpoint's on the left, ours on the right. The
reversed table is for export.

A checkpoint may lack parts of our model. `Kind.fills` maps the prefix of such a part to the prefix
of the part that is copied into it, or to None, which keeps the initial values. A part is filled
only if all of it is missing; a part that is incomplete raises an error.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

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
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
}
HF_BLOCK = {"layer_norm1.*": "norm1.*", "layer_norm2.*": "norm2.*", "mlp.*": "mlp.*"}
HF_CLIP = {
    "vision_model.embeddings.class_embedding": "visual.cls_token",
    "vision_model.embeddings.position_embedding.weight": "visual.pos_embed",
    "vision_model.embeddings.patch_embedding.*": "visual.patch_embed.proj.*",
    "vision_model.pre_layrnorm.*": "visual.norm_pre.*",
    "vision_model.post_layernorm.*": "visual.norm.*",
    **_with_prefix(
        "vision_model.encoder.layers.*.",
        "visual.blocks.*.",
        HF_BLOCK | {f"self_attn.{QKV}_proj.*": "attn.qkv.*", "self_attn.out_proj.*": "attn.proj.*"},
    ),
    "text_model.*": "text.transformer.*",
    "visual_projection.weight": "image_projection.weight",
    "text_projection.weight": "text_projection.weight",
    "logit_scale": "logit_scale",
}
HF_BLIP_VIT = {
    "vision_model.embeddings.class_embedding": "encoders.visual.cls_token",
    "vision_model.embeddings.position_embedding": "encoders.visual.pos_embed",
    "vision_model.embeddings.patch_embedding.*": "encoders.visual.patch_embed.proj.*",
    "vision_model.post_layernorm.*": "encoders.visual.norm.*",
    **_with_prefix(
        "vision_model.encoder.layers.*.",
        "encoders.visual.blocks.*.",
        HF_BLOCK | {"self_attn.qkv.*": "attn.qkv.*", "self_attn.projection.*": "attn.proj.*"},
    ),
}
PROJECTIONS = {
    "vision_proj.*": "encoders.image_projection.*",
    "text_proj.*": "encoders.text_projection.*",
}
TEXT_ENCODER = _with_prefix("text_encoder.", "encoders.text.", BERT)
TEXT_DECODER = {
    **_with_prefix("text_decoder.bert.", "decoder.", BERT),
    "text_decoder.cls.*": "language_head.*",
}
ITM_HEAD = {"itm_head.*": "itm_head.*"}
QUEUE = {
    "temp": "temperature",
    "image_queue": "queue.image",
    "text_queue": "queue.text",
    "queue_ptr": "queue.pointer",
    "ptr_queue": "queue.pointer",
}


def _with_momentum_copies(names: Names) -> Names:
    copies = {
        left.replace(".", "_m.", 1): right.replace("encoders.", "encoders_m.", 1)
        for left, right in names.items()
    }
    return names | copies


VISUAL_ENCODER = {"visual_encoder.*": "encoders.visual.*"}
ALBEF_TEXT = {
    **_with_prefix("text_encoder.bert.", "encoders.text.", BERT),
    "text_encoder.cls.*": "encoders.language_head.*",
}
SHARED = _with_momentum_copies(VISUAL_ENCODER | PROJECTIONS)
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

INFERENCE: dict[str, str | None] = {"encoders_m.": "encoders.", "queue.": None}
NO_DECODER: dict[str, str | None] = {"language_head.": None, "decoder.": "encoders.text."}
NO_LANGUAGE_HEAD: dict[str, str | None] = {
    "encoders.language_head.": None,
    "encoders_m.language_head.": "encoders.language_head.",
}
NO_PROJECTIONS: dict[str, str | None] = {
    "encoders.image_projection.": None,
    "encoders.text_projection.": None,
    "itm_head.": None,
    "temperature": None,
}


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint.

    Attributes:
        family: family of our model.
        names: table of names.
        has: patterns of names that every checkpoint of this kind has.
        without: patterns of names that no checkpoint of this kind has.
        fills: prefixes of our parts that may be missing, and of what is copied into them.
        ignored: patterns of tensors that are not loaded.
        architecture: class of transformers, for its checkpoints.
    """

    family: str
    names: Names
    has: tuple[str, ...]
    without: tuple[str, ...] = ()
    fills: dict[str, str | None] = field(default_factory=dict)
    ignored: tuple[str, ...] = ("*.position_ids",)
    architecture: str | None = None


UNUSED_OF_METER = [
    f"vit_model.{name}"
    for name in (
        *("visual.proj", "transformer.*", "token_embedding.*", "positional_embedding"),
        *("ln_final.*", "text_projection", "logit_scale"),
    )
]
VISUAL = "visual_encoder.cls_token"
HF_VISUAL = "vision_model.embeddings.class_embedding"
TOKEN_TYPES = "text_encoder.embeddings.token_type_embeddings.weight"
KINDS = {
    "albef": Kind(
        "albef",
        SHARED | _with_momentum_copies(ALBEF_TEXT) | ITM_HEAD | QUEUE,
        has=(VISUAL, "text_encoder.bert.*"),
        fills=INFERENCE,
    ),
    "albef_retrieval": Kind(
        "albef",
        SHARED | _with_momentum_copies(TEXT_ENCODER) | ITM_HEAD | QUEUE,
        has=(VISUAL, TOKEN_TYPES),
        fills=NO_LANGUAGE_HEAD | INFERENCE,
        ignored=("*.position_ids", "idx_queue"),
    ),
    "blip": Kind(
        "blip",
        SHARED | _with_momentum_copies(TEXT_ENCODER) | TEXT_DECODER | ITM_HEAD | QUEUE,
        has=(VISUAL, "text_encoder.encoder.*", "text_decoder.*", "vision_proj.*"),
        without=(TOKEN_TYPES,),
        fills=INFERENCE,
    ),
    "blip_retrieval": Kind(
        "blip",
        SHARED | _with_momentum_copies(TEXT_ENCODER) | ITM_HEAD | QUEUE,
        has=(VISUAL, "text_encoder.encoder.*", "vision_proj.*"),
        without=(TOKEN_TYPES, "text_decoder.*"),
        fills=NO_DECODER | INFERENCE,
        ignored=("*.position_ids", "idx_queue"),
    ),
    "blip_caption": Kind(
        "blip",
        VISUAL_ENCODER | TEXT_DECODER,
        has=(VISUAL, "text_decoder.*"),
        without=("text_encoder.*",),
        fills=NO_PROJECTIONS | {"encoders.text.": "decoder."} | INFERENCE,
    ),
    "blip_vqa": Kind(
        "blip",
        VISUAL_ENCODER | TEXT_ENCODER | TEXT_DECODER,
        has=(VISUAL, "text_encoder.encoder.*", "text_decoder.*"),
        without=(TOKEN_TYPES, "vision_proj.*", "itm_head.*"),
        fills=NO_PROJECTIONS | INFERENCE,
    ),
    "meter": Kind(
        "meter",
        METER,
        has=("vit_model.visual.conv1.weight", "text_transformer.*"),
        ignored=("*.position_ids", "text_transformer.pooler.*", *UNUSED_OF_METER),
    ),
    "open_clip": Kind(
        "clip",
        OPEN_CLIP | OPEN_CLIP_TEXT,
        has=("visual.class_embedding", "token_embedding.weight"),
        ignored=("attn_mask", "input_resolution", "context_length", "vocab_size"),
    ),
    "open_clip_custom_text": Kind(
        "clip",
        OPEN_CLIP | _with_prefix("text.", "", OPEN_CLIP_TEXT),
        has=("visual.class_embedding", "text.token_embedding.weight"),
        ignored=("text.attn_mask",),
    ),
    "hf_clip": Kind(
        "clip",
        HF_CLIP,
        has=("vision_model.pre_layrnorm.weight", "text_model.embeddings.token_embedding.weight"),
        architecture="CLIPModel",
    ),
    "hf_blip_retrieval": Kind(
        "blip",
        HF_BLIP_VIT | TEXT_ENCODER | PROJECTIONS | ITM_HEAD,
        has=(HF_VISUAL, "text_encoder.encoder.*", "vision_proj.*"),
        fills=NO_DECODER | {"temperature": None} | INFERENCE,
        architecture="BlipForImageTextRetrieval",
    ),
    "hf_blip_caption": Kind(
        "blip",
        HF_BLIP_VIT | TEXT_DECODER,
        has=(HF_VISUAL, "text_decoder.*"),
        without=("text_encoder.*",),
        fills=NO_PROJECTIONS | {"encoders.text.": "decoder."} | INFERENCE,
        architecture="BlipForConditionalGeneration",
    ),
    "hf_blip_vqa": Kind(
        "blip",
        HF_BLIP_VIT | TEXT_ENCODER | TEXT_DECODER,
        has=(HF_VISUAL, "text_encoder.encoder.*", "text_decoder.*"),
        without=("vision_proj.*", "itm_head.*"),
        fills=NO_PROJECTIONS | INFERENCE,
        architecture="BlipForQuestionAnswering",
    ),
    "hf_blip": Kind(  # only towers: its features pass a pooler and a norm that our model lacks
        "blip",
        HF_BLIP_VIT | _with_prefix("text_model.", "encoders.text.", BERT),
        has=(HF_VISUAL, "text_model.encoder.layer.*"),
        fills=NO_PROJECTIONS | NO_DECODER | INFERENCE,
        architecture="BlipModel",
    ),
}


def recognise_kind(names: Iterable[str]) -> str:
    """Return the kind of a checkpoint by its tensor names; no or several kinds raise ValueError."""
    names = list(names)

    def is_there(pattern: str) -> bool:
        return any(fnmatchcase(name, pattern) for name in names)

    found = [
        kind
        for kind, spec in KINDS.items()
        if all(map(is_there, spec.has)) and not any(map(is_there, spec.without))
    ]
    if len(found) != 1:
        several = f"one that matches {' and '.join(found)}"
        got = several if found else f"names such as {', '.join(sorted(names)[:3])}"
        raise ValueError(
            f"source: expected a kind of checkpoint among {', '.join(KINDS)}, got {got}; pass kind="
        )
    return found[0]
