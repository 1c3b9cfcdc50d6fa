"""Fuse the CLS token with a text, and return the tokens with the fused CLS token first.

    c   = f x_cls + (1 - f) x_text; "match" first scales x_text to the norm of x_cls    (B, D)
    out = [c, x_1, .., x_{N-1}]                                                         (B, N, D)

A text vector of zeros means no text: c is x_cls. There is no gradient: the result is used to select
tokens. `absorbed_query.py` fuses in its kernel. Source: ELIP, Eq. 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_kernels._example import Arguments, Sizes, example_of
from elip_kernels._validate import check_device, check_tensor, check_tokens, message, plain_number
from elip_kernels.autocast import without_autocast
from elip_kernels.ops.gather_ops import accumulator

LEAST_NORM = 1e-12  # as in torch.nn.functional.normalize


def fuse_text(
    tokens: Tensor, text: Tensor | None, fusion: float, guidance_norm: str = "none"
) -> Tensor:
    """Replace the CLS token by its fusion with a text (ELIP, Eq. 1).

    Scoring layers then select tokens with regard to the text. Example::

        fused = elip_kernels.fuse_text(tokens, text_cls, 0.8)  # 80% CLS, 20% text

    Args:
        tokens: (B, N, D), fp32, bf16, fp16 or fp64; row 0 is CLS.
        text: (B, D), or (1, D) for all images, in any of these dtypes. A row of zeros means no
            text. None means no text at all.
        fusion: share of CLS, in [0, 1]. With 1 the text is not read.
        guidance_norm: "match" first scales the text to the norm of the CLS token; "none" does not.

    Returns:
        (B, N, D) in the dtype of `tokens`, without gradient. It shares the memory of `tokens` if
        there is no text or `fusion` is 1.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or value.
    """
    check_tokens(tokens, 1)
    fusion = check_guidance(tokens, text, fusion, guidance_norm)
    tokens = tokens.detach()
    if text is None or fusion == 1:
        return tokens
    return _fuse_first(tokens, text.detach(), fusion, guidance_norm == "match")


@without_autocast
def _fuse_first(tokens: Tensor, text: Tensor, fusion: float, match: bool) -> Tensor:
    """Fuse in full precision and round once."""
    cls = fuse(tokens[:, 0].to(accumulator(tokens)), text, fusion, match)
    return torch.cat([cls.to(tokens.dtype)[:, None], tokens[:, 1:]], 1)


def check_guidance(tokens: Tensor, text: Tensor | None, fusion: float, guidance_norm: str) -> float:
    """Check that `text`, `fusion` and `guidance_norm` can guide `tokens` (B, N, D).

    Returns:
        `fusion` as a float.
    """
    B, _, D = tokens.shape
    if text is not None:
        check_tensor("text", text, "(B, D) or (1, D)", 2)
        if text.shape not in ((B, D), (1, D)):
            raise ValueError(message("text", f"(B, D) = {(B, D)}, or (1, D) for all images", text))
        check_device("text", text, "tokens", tokens)
    fusion = plain_number(fusion)
    if isinstance(fusion, bool) or not isinstance(fusion, (int, float)):
        raise TypeError(message("fusion", "a float in [0, 1]", fusion))
    if not 0 <= fusion <= 1:
        raise ValueError(message("fusion", "a float in [0, 1]", fusion))
    if not isinstance(guidance_norm, str) or guidance_norm not in ("none", "match"):
        raise ValueError(message("guidance_norm", "'none' or 'match'", guidance_norm))
    return float(fusion)


def fuse(cls: Tensor, text: Tensor | None, fusion: float, match: bool) -> Tensor:
    """Return the fused CLS token (B, D) of Eq. 1, in the dtype of `cls`.

    Args:
        cls: (B, D).
        text: (B, D) or (1, D), where a vector of zeros means no text; or None.
        fusion: share of `cls`, in [0, 1].
        match: scale `text` to the norm of `cls` first.
    """
    if text is None or fusion == 1.0:
        return cls
    text = text.to(cls.dtype)
    is_text = (text != 0).any(1, keepdim=True)
    if match:
        text = F.normalize(text, dim=1, eps=LEAST_NORM) * cls.norm(dim=1, keepdim=True)
    return torch.where(is_text, fusion * cls + (1.0 - fusion) * text, cls)


@example_of(fuse_text, has_kernels=False)
def _example(sizes: Sizes) -> Arguments:
    text = torch.randn(sizes.B, sizes.D).to(sizes.dtype)
    return {"tokens": sizes.tokens(), "text": text, "fusion": 0.8, "guidance_norm": "match"}
