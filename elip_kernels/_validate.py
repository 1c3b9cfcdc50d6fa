"""Argument checks of the public functions, and the format of their error messages."""

import reprlib
import sys
from numbers import Integral, Rational, Real
from typing import Any

import torch
from torch import Tensor
from torch.masked import MaskedTensor

from elip_kernels.ops.gather_ops import accumulator

STRIDED = torch.strided
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _ShortRepr(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        """Return a short form of `x`; Python prints at most 4,300 digits."""
        bits = x.bit_length()
        return super().repr_int(x, level) if bits < 1000 else f"an int of {bits} bits"


SHORT = _ShortRepr()
SHORT.maxstring = SHORT.maxother = 100
SHORT.maxlevel, SHORT.maxlist, SHORT.maxtuple = 2, 4, 4


def describe_value(value: Any) -> str:
    """Return the shape, dtype and device of a tensor, or a short repr and type of another value."""
    if not isinstance(value, Tensor):
        return f"{SHORT.repr(value)} ({type(value).__name__})"
    is_strided_nested = value.is_nested and value.layout is torch.strided
    shape = "nested" if is_strided_nested else tuple(value.shape)
    layout = "" if value.layout is torch.strided else f" {value.layout}"
    return f"{shape} {value.dtype}{layout} on {value.device}".replace("torch.", "")


def message(argument: str, expected: str, got: Any, remedy: str = "") -> str:
    """Return an error message: argument, requirement, value and, if given, remedy."""
    return described(argument, expected, describe_value(got), remedy)


def described(argument: str, expected: str, got: str, remedy: str = "") -> str:
    """Return an error message as `message` does, for a value that is described already."""
    return f"{argument}: expected {expected}, got {got}" + (f"; {remedy}" if remedy else "")


def plain_number(value: Any) -> Any:
    """Return a number of NumPy as the int or float with the same digits; others as they are."""
    if isinstance(value, (int, float)) or not isinstance(value, Real):
        return value
    if isinstance(value, Integral):
        return int(value)
    return value if isinstance(value, Rational) else float(str(value))


def check_dense(argument: str, value: Any, kind: str, shape: str) -> None:
    """Check that `value` is a dense tensor: strided, and neither nested nor masked."""
    if not isinstance(value, Tensor):
        raise TypeError(message(argument, f"{kind} {shape}", value))
    if value.layout is not STRIDED or value.is_nested or isinstance(value, MaskedTensor):
        got = f"{describe_value(value)} ({type(value).__name__})"
        remedy = "convert it to a dense tensor"
        raise TypeError(described(argument, f"{kind} {shape}", got, remedy))


def check_tensor(argument: str, value: Any, shape: str, ndim: int | tuple[int, ...]) -> None:
    """Check that `value` is a dense floating-point tensor with `ndim` dimensions, named `shape`."""
    check_dense(argument, value, "a tensor", shape)
    if value.dim() not in (ndim if isinstance(ndim, tuple) else (ndim,)):
        raise ValueError(message(argument, f"a tensor {shape}", value))
    if value.dtype not in FLOATS:
        raise TypeError(
            message(argument, "fp32, bf16, fp16 or fp64", value, f"cast it: {argument}.float()")
        )


def check_tokens(tokens: Any, least: int = 1) -> None:
    """Check that `tokens` has shape (B, N, D), with N at least `least` and D at least 1."""
    check_tensor("tokens", tokens, "(B, N, D)", 3)
    if tokens.shape[1] < least or tokens.shape[2] < 1:
        raise ValueError(message("tokens", f"(B, N, D) with N >= {least} and D >= 1", tokens))


def check_device(argument: str, value: Tensor, reference: str, other: Tensor) -> None:
    """Check that `value` is on the device of `other`, an argument named `reference`."""
    if value.device != other.device:
        remedy = f"use {argument}.to({reference}.device)"
        raise ValueError(message(argument, f"a tensor on {other.device}", value, remedy))


def check_shape(argument: str, value: Tensor, shape: tuple[int, ...], names: str) -> None:
    """Check that `value` has exactly `shape`, whose dimensions are called `names`."""
    if value.shape != shape:
        raise ValueError(message(argument, f"{names} = {shape}", value))


def check_heads(num_heads: int, width: int) -> None:
    """Check that `num_heads` divides the `width` of the query projection."""
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(message("num_heads", "an int", num_heads))
    if width < 1 or num_heads < 1 or width % num_heads:
        raise ValueError(message("num_heads", f"a divisor of H*d = {width}", num_heads))


def check_scale(scale: float | None, head_dim: int) -> float:
    """Return `scale` as a float, or head_dim ** -0.5 if it is None."""
    if scale is None:
        return head_dim**-0.5
    scale = plain_number(scale)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(message("scale", "a float or None", scale))
    if not abs(scale) <= sys.float_info.max:
        raise ValueError(message("scale", "a finite float or None", scale))
    return float(scale)


def check_mask(
    mask: Tensor | None,
    shape: tuple[int, int],
    reference: str,
    other: Tensor,
    *,
    argument: str = "mask",
    names: str = "(B, N)",
) -> None:
    """Check that `mask` is None, or a bool tensor of `shape` on the device of `other`."""
    if mask is None:
        return
    check_dense(argument, mask, "a bool tensor", names)
    if mask.dtype != torch.bool:
        raise TypeError(message(argument, f"a bool tensor {names}, True = real", mask))
    check_shape(argument, mask, shape, names)
    check_device(argument, mask, reference, other)


def check_flags(**flags: bool) -> None:
    """Check that every argument is a bool."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(message(name, "True or False", flag))


def check_keep(keep: int | float, candidates: int, *, all_allowed: bool = True) -> int:
    """Return the number of kept candidates for a count or a ratio of `candidates`.

    Args:
        keep: int, a count; or float, a ratio in (0, 1].
        candidates: number of tokens to choose from.
        all_allowed: whether all candidates may be kept.
    """
    keep = plain_number(keep)
    if isinstance(keep, bool) or not isinstance(keep, (int, float, torch.SymInt)):
        remedy = "pass 0.7 for 70% of the candidates, or 70 for 70 of them"
        raise TypeError(message("keep", "an int, or a float ratio in (0, 1]", keep, remedy))
    count = keep
    if isinstance(keep, float):
        if not 0.0 < keep <= 1.0:
            remedy = f"an int counts tokens{_share_of_percent(keep)}"
            raise ValueError(message("keep", "a ratio in (0, 1]", keep, remedy))
        count = max(1, int(keep * candidates))
    most = candidates if all_allowed else candidates - 1
    if not 1 <= count <= most:
        remedy = f"there are {candidates} candidates{_share_of_percent(keep)}"
        raise ValueError(message("keep", f"1 to {most} candidates kept", keep, remedy))
    return count


def _share_of_percent(keep: int | float) -> str:
    """Return the end of an error for a `keep` that may be meant as a percentage, or ""."""
    is_percent = isinstance(keep, (int, float)) and 10 <= keep <= 100
    return f"; pass {keep / 100:g} for {keep:g}%" if is_percent else ""


def check_prefix(num_prefix_tokens: int, N: int) -> None:
    """Check that `num_prefix_tokens` is an int that leaves at least one of N tokens."""
    if isinstance(num_prefix_tokens, bool) or not isinstance(num_prefix_tokens, int):
        raise TypeError(message("num_prefix_tokens", "an int", num_prefix_tokens))
    if not 0 <= num_prefix_tokens < N:
        expected = f"0 <= num_prefix_tokens < N = {N}"
        raise ValueError(message("num_prefix_tokens", expected, num_prefix_tokens))


def check_metric(metric: Tensor, tokens: Tensor) -> None:
    """Check that `metric` is (B, N, C) on the device of `tokens` (B, N, D), with C at least 1."""
    B, N, _ = tokens.shape
    check_tensor("metric", metric, "(B, N, C)", 3)
    if metric.shape[2] < 1:
        raise ValueError(message("metric", "(B, N, C) with C >= 1", metric))
    check_shape("metric", metric, (B, N, metric.shape[2]), "(B, N, C)")
    check_device("metric", metric, "tokens", tokens)


def is_readable(tensor: Tensor) -> bool:
    """Return whether to check values: on the CPU, outside of graphs and `vmap`.

    Reading a value on a GPU would wait for the device. There the kernels mask what is out of range.
    """
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if is_traced or not tensor.is_cpu or type(tensor) is not Tensor:
        return False
    try:
        tensor.any().item()
    except RuntimeError:  # of `vmap`, and of modes of PyTorch that have no values
        return False
    return True


def check_range(argument: str, values: Tensor, least: float, most: float) -> None:
    """Check that all values are from `least` to `most`, where they are readable."""
    if not is_readable(values) or values.numel() == 0:
        return
    low, high = (value.item() for value in values.aminmax())
    if not least <= low <= high <= most:
        expected = f"values of at least {least} and at most {most}"
        raise ValueError(described(argument, expected, f"values from {low} to {high}"))


def check_positions(argument: str, kept: Tensor, first: int, N: int) -> None:
    """Check that each row of `kept` (B, K) has different positions from `first` to N-1, or -1."""
    if not is_readable(kept):
        return
    for image, row in enumerate(kept.tolist()):
        real = [n for n in row if n != -1]
        is_distinct = len(set(real)) == len(real)
        if real and not (is_distinct and first <= min(real) and max(real) < N):
            expected = f"different positions from {first} to {N - 1}, or -1 for padding"
            got = f"{SHORT.repr(row)} in image {image}"
            raise ValueError(described(argument, expected, got))


def reduce_arguments(
    tokens: Tensor, attn: Tensor, keep: int | float, mask: Tensor | None, num_prefix_tokens: int
) -> tuple[Tensor, int]:
    """Check the arguments of `reduce`; return scores (B, N-p) without gradient, and a count."""
    try:
        return _reduce_arguments(tokens, attn, keep, mask, num_prefix_tokens)
    except (TypeError, ValueError) as error:
        if not _are_swapped(tokens, attn, keep):
            raise
        raise type(error)(f"{error}; pass them in the order reduce(tokens, attn, keep)") from None


def _are_swapped(tokens: Any, attn: Any, keep: Any) -> bool:
    """Return whether refused arguments of `reduce` look like others of them."""
    if isinstance(keep, Tensor):
        return keep.dim() > 1
    given = [each for each in (tokens, attn) if isinstance(each, Tensor) and not each.is_nested]
    shapes = [tuple(each.shape) for each in given]
    if list(map(len, shapes)) not in ([2, 3], [3, 3], [4, 3]):
        return False
    (B, *_, last), (images, N, _) = shapes
    return images == B and last <= N


def _reduce_arguments(
    tokens: Tensor, attn: Tensor, keep: int | float, mask: Tensor | None, num_prefix_tokens: int
) -> tuple[Tensor, int]:
    check_tokens(tokens)
    B, N, _ = tokens.shape
    check_prefix(num_prefix_tokens, N)
    candidates = N - num_prefix_tokens
    check_tensor("attn", attn, "(B, N-p), (B, N), (B, H, N) or (B, H, N, N)", (2, 3, 4))
    check_device("attn", attn, "tokens", tokens)
    scores = candidate_scores(attn, B, N, num_prefix_tokens)
    keep = check_keep(keep, candidates)
    check_mask(mask, (B, N), "tokens", tokens)
    return scores, keep


def candidate_scores(attn: Tensor, B: int, N: int, num_prefix_tokens: int) -> Tensor:
    """Return scores (B, N-p) from scores, rows or a map: the mean over heads, without gradient."""
    attn = attn.detach()
    if attn.dim() == 2:
        allowed = ((B, N - num_prefix_tokens), (B, N))
        if tuple(attn.shape) not in allowed:
            expected = f"(B, N-p) = {allowed[0]} or (B, N) = {allowed[1]}"
            raise ValueError(message("attn", expected, attn))
        return attn if attn.shape[1] == N - num_prefix_tokens else attn[:, num_prefix_tokens:]
    heads = max(1, attn.shape[1])
    if attn.dim() == 3:
        check_shape("attn", attn, (B, heads, N), "(B, H, N)")
    else:
        check_shape("attn", attn, (B, heads, N, N), "(B, H, N, N)")
        if num_prefix_tokens == 0:
            remedy = "pass scores (B, N) instead"
            raise ValueError(message("attn", "no map if num_prefix_tokens is 0", attn, remedy))
        attn = attn[:, :, 0]
    return attn[..., num_prefix_tokens:].mean(1, dtype=accumulator(attn))
