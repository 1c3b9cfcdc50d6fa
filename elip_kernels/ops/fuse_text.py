"""Fuse the CLS token with a text, and return the tokens with the fused CLS token first.

    c   = f x_cls + (1 - f) x_text; "match" first scales x_text to the norm of x_cls    (B, D)
    out = [c, x_1, .., x_{N-1}]                                                         (B, N, D)

A text vector of zeros means no text: c is x_cls. One launch reads and writes each token once. There
is no gradient: the result is used to select tokens. Source: ELIP, Eq. 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_kernels import launch
from elip_kernels._kernel import kernel
from elip_kernels._operator import Operator
from elip_kernels._triton import tl, triton
from elip_kernels._validate import check_device, check_tensor, check_tokens, message
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
    check_guidance(tokens, text, fusion, guidance_norm)
    tokens = tokens.detach()
    if text is None or fusion == 1:
        return tokens
    return _fuse_text_op(tokens, text.detach(), float(fusion), guidance_norm == "match")


def check_guidance(tokens: Tensor, text: Tensor | None, fusion: float, guidance_norm: str) -> None:
    """Check that `text`, `fusion` and `guidance_norm` can guide `tokens` (B, N, D)."""
    B, _, D = tokens.shape
    if text is not None:
        check_tensor("text", text, "(B, D) or (1, D)", 2)
        if text.shape not in ((B, D), (1, D)):
            raise ValueError(message("text", f"(B, D) = {(B, D)}, or (1, D) for all images", text))
        check_device("text", text, "tokens", tokens)
    if isinstance(fusion, bool) or not isinstance(fusion, (int, float)):
        raise TypeError(message("fusion", "a float in [0, 1]", fusion))
    if not 0 <= fusion <= 1:
        raise ValueError(message("fusion", "a float in [0, 1]", fusion))
    if not isinstance(guidance_norm, str) or guidance_norm not in ("none", "match"):
        raise ValueError(message("guidance_norm", "'none' or 'match'", guidance_norm))


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


def fuse_text_reference(tokens: Tensor, text: Tensor, fusion: float, match: bool) -> Tensor:
    """Compute `fuse_text` in PyTorch: fuse in full precision and round once."""
    wide = tokens[:, :1].to(accumulator(tokens))
    cls = fuse(wide[:, 0], text, fusion, match)[:, None].to(tokens.dtype)
    return torch.cat([cls, tokens[:, 1:]], 1)


@triton.jit
def load_fused(cls_ptr, text_ptr, offs_c, offs_t, mask, f_cls, f_text, HAS_TEXT: tl.constexpr):
    """Load a slice of c in fp32 [BLOCK_B, features]."""
    cls = tl.load(cls_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    if HAS_TEXT:
        text = tl.load(text_ptr + offs_t, mask=mask, other=0.0).to(tl.float32)
        cls = cls * f_cls[:, None] + text * f_text[:, None]
    return cls


@triton.jit
def fusion_scales(
    cls_ptr, text_ptr, row_c, row_t, mask_b, D, fusion, BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr, HAS_TEXT: tl.constexpr, MATCH: tl.constexpr, LEAST_NORM: tl.constexpr,
):  # fmt: skip
    """Return the factors of CLS and of the text in c, and the mean of c, all [BLOCK_B]."""
    fusion = tl.cast(fusion, tl.float32)
    f_cls = tl.full([BLOCK_B], 1.0, tl.float32)
    f_text = tl.zeros([BLOCK_B], tl.float32)
    sum_cls = tl.zeros([BLOCK_B], tl.float32)
    sum_text = tl.zeros([BLOCK_B], tl.float32)
    is_text = tl.zeros([BLOCK_B], tl.int32)
    norm_cls = tl.zeros([BLOCK_B], tl.float32)
    norm_text = tl.zeros([BLOCK_B], tl.float32)
    for d in tl.range(0, D, BLOCK_R, num_stages=3):
        offs = (d + tl.arange(0, BLOCK_R))[None, :]
        mask = mask_b[:, None] & (offs < D)
        cls = tl.load(cls_ptr + row_c + offs, mask=mask, other=0.0).to(tl.float32)
        sum_cls += tl.sum(cls, 1)
        if HAS_TEXT:
            text = tl.load(text_ptr + row_t + offs, mask=mask, other=0.0).to(tl.float32)
            sum_text += tl.sum(text, 1)
            is_text = tl.maximum(is_text, tl.max((text != 0).to(tl.int32), 1))
            if MATCH:
                norm_cls += tl.sum(cls * cls, 1)
                norm_text += tl.sum(text * text, 1)
    if HAS_TEXT:
        f_cls = tl.where(is_text == 1, fusion, 1.0)
        f_text = tl.where(is_text == 1, 1.0 - fusion, 0.0)
        if MATCH:
            f_text *= tl.sqrt(norm_cls) / tl.maximum(tl.sqrt(norm_text), LEAST_NORM)
    return f_cls, f_text, (f_cls * sum_cls + f_text * sum_text) / D


@kernel(do_not_specialize=["N"])
def _fuse_kernel(
    tokens_ptr, text_ptr, out_ptr, stride_tb, stride_tn, stride_xb, N, D, fusion,
    MATCH: tl.constexpr, LEAST_NORM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Copy a tile of patches; the first program also fuses CLS. Grid: (image, tile of patches)."""
    pid_b = tl.program_id(0).to(tl.int64)
    pid_t = tl.program_id(1)
    tokens_ptr += pid_b * stride_tb
    text_ptr += pid_b * stride_xb
    out_ptr += pid_b * N * D
    if pid_t == 0:
        first = tl.zeros([1, 1], tl.int32)
        mask_b = tl.full([1], 1, tl.int1)
        f_cls, f_text, _ = fusion_scales(
            tokens_ptr, text_ptr, first, first, mask_b, D, fusion,
            1, BLOCK_R, True, MATCH, LEAST_NORM,
        )  # fmt: skip
        for d in range(0, D, BLOCK_R):
            offs = (d + tl.arange(0, BLOCK_R))[None, :]
            c = load_fused(tokens_ptr, text_ptr, offs, offs, offs < D, f_cls, f_text, True)
            tl.store(out_ptr + offs, c.to(out_ptr.dtype.element_ty), mask=offs < D)
    offs_n = 1 + pid_t * BLOCK_N + tl.arange(0, BLOCK_N)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask = (offs_n < N)[:, None] & (offs_d < D)[None, :]
        x = tl.load(tokens_ptr + offs_n[:, None] * stride_tn + offs_d[None, :], mask=mask)
        tl.store(out_ptr + offs_n[:, None] * D + offs_d[None, :], x, mask=mask)


def _fuse_text(tokens: Tensor, text: Tensor, fusion: float, match: bool) -> Tensor:
    """Allocate and launch."""
    B, N, D = tokens.shape
    tokens = launch.addressable(tokens)
    text = text if text.stride(1) == 1 else text.contiguous()
    out = tokens.new_empty(B, N, D)
    if B == 0:
        return out
    block_n, block_d, num_warps = launch.copy(tokens.element_size())
    with launch.device_guard(tokens):
        _fuse_kernel[(B, max(1, launch.cdiv(N - 1, block_n)))](
            *(tokens, text, out, *tokens.stride()[:2]),
            *(0 if text.shape[0] == 1 else text.stride(0), N, D, fusion),
            MATCH=match,
            LEAST_NORM=LEAST_NORM,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            BLOCK_R=launch.FEATURES,
            num_warps=num_warps,
            **launch.CODE,
        )
    return out


_fuse_text_op = Operator(
    "fuse_text",
    fuse_text_reference,
    launcher=_fuse_text,
    unsupported=lambda tokens, text, *_: launch.unsupported(
        tokens, text, candidates=tokens.shape[1] - 1
    ),
    fake=lambda tokens, *_: tokens.new_empty(tokens.shape),
    flops=lambda *_, **__: 0,
)
