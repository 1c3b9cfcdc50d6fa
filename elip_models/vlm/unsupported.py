"""Why other image-text models of transformers cannot be reduced as multimodal language models."""

from elip_models.towers.unsupported import first_match
from elip_models.vlm.families import FAMILIES

INDEXED = (
    "has layers that select keys by an index of their own, which no test covers yet; 'tome' and "
    "others reduce its image tower if that is supported"
)
REASONS = {
    "blip florence2 pix2struct pp_formulanet t5gemma2 udop vision-encoder-decoder": "is an encoder "
    "with a decoder that reads it by cross-attention; 'tome' and others reduce a supported encoder",
    "blip-2 instructblip*": "has a Q-Former, which makes few tokens of an image already; 'tome' "
    "and others reduce its image tower",
    "idefics": "reads images by gated cross-attention inside its own layers",
    "git kosmos-2 kosmos-2.5": "puts image features into the sequence inside its language model",
    "fuyu gemma4_unified": "has no image tower: its language model reads projected patches",
    "apertus1p5 chameleon emu3": "reads images as words of a codebook, whose embeddings are those "
    "of text",
    "evolla": "reads proteins and no images",
    "pi0": "returns actions and no text",
    "diffusion_gemma": "generates blocks by diffusion and not token by token",
    "mistral4": "reads text alone",
    "dots3_note glm5_next hy_v4_vl minimax_m3_vl mistral_large4": INDEXED,
    "inkling* lfm3_vl nemotron_h_omni unlimited_ocr": "has layers of a type, such as hybrid or "
    "with reference tokens, whose state counts every token",
    "granite4_vision": "adds further image features between the layers of its language model",
    "*": "is not compared with the transformers model by a test yet; 'tome' and others reduce "
    "its image tower if that is supported",
}
"""Reasons as patterns of `config.model_type`."""


def language_support() -> dict[str, str | None]:
    """Return why the language model of each image-text model of transformers cannot be reduced.

    Returns:
        the reason by `config.model_type`, or None if it can be reduced. The types are those that
        the installed transformers lists as models of images and texts that generate text.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return {
        kind: None if kind in FAMILIES else f"it {first_match(REASONS, kind)}"
        for kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    }
