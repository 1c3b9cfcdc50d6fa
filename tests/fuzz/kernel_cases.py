"""Hostile tensors and numbers given to each public function of elip_kernels.

A result must be that of plain tensors with the same values, within rounding.
"""

import inspect
import math
import re
from fractions import Fraction

import numpy as np
import torch

from elip_kernels._example import EXAMPLES, Sizes
from tests.fuzz.harness import Loss, kind

B, N, D, H = 2, 7, 6, 2
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHER_DTYPES = (torch.complex64, torch.bool, torch.int8, torch.uint16, torch.float8_e4m3fn)
NUMBERS = (
    *(0, 1, -1, 2, N, N + 1, 2**31, -(2**63), 10**30, True, False, None),
    *(0.0, -0.0, 0.5, 1.0, 1.5, 5e-324, 1e308, math.nan, math.inf, -math.inf, 1j),
    *(np.int64(2), np.float32(0.5), np.float64(0.5), np.array([1, 2]), np.bool_(True)),
    *(torch.tensor(2), torch.tensor(0.5), Fraction(1, 2), "2", b"2", "match", [], {}, (1,), len),
)
VALUES = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 1e-38, 3e38, -3e38, 65504.0, 1.0)
INDICES = (-(2**40), -2, -1, 0, 1, N - 1, N, 2**40)
LAYOUTS = (
    torch.Tensor.to_sparse,
    torch.Tensor.to_sparse_csr,
    torch.Tensor.to_sparse_csc,
    torch.Tensor.to_mkldnn,
    lambda x: torch.nested.nested_tensor(list(x)),
    lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
    lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    lambda x: torch.masked.masked_tensor(x, x > 0),
    lambda x: x.to("meta"),
)
VIEWS = (
    lambda x: x[..., :1].expand(x.shape),
    lambda x: x[:1].expand(x.shape),
    lambda x: x.flatten().as_strided(x.shape, [1] * x.dim()),
    lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    lambda x: torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape),
    lambda x: torch.complex(x, -x).conj().imag if x.dtype in DTYPES[:2] else x.clone(),
    lambda x: torch.nn.Parameter(x) if x.is_floating_point() else torch.nn.Buffer(x),
    lambda x: x.flip(0),
)
SHAPES = (
    lambda x: x[0],
    lambda x: x[None],
    lambda x: x[:0],
    lambda x: x[:, :0],
    lambda x: x[..., :0],
    lambda x: torch.cat([x, x], -1),
    lambda x: x.flatten(),
)


def arguments(rng):
    """A public function and arguments that it takes: its example with other values and options."""
    name, dtype = rng.choice(sorted(EXAMPLES)), rng.choice(DTYPES)
    function = EXAMPLES[name].function
    mask, scores = torch.rand(B, N) > 0.3, torch.rand(B, H, N, N).to(dtype)
    others = {
        "keep": rng.choice((1, 3, 0.5)),
        "mask": rng.choice((None, mask)),
        "query_mask": None,
        "size": rng.choice((None, torch.rand(B, N) + 0.01)),
        "first": rng.choice((None, torch.arange(B))),
        "relevance": rng.choice((None, torch.rand(B, N) + 0.01)),
        "text": torch.randn(B, D).to(dtype),
        "scored": torch.randn(B, N, D).to(dtype),
        "attn": rng.choice((scores[:, 0, 0], scores[:, :, 0], scores)),
        "selection_order": rng.random() < 0.5,
        "scale": rng.choice((None, 0.5)),
        "num_prefix_tokens": 1,
        "fusion": 0.7,
        "guidance_norm": "none",
        "merge": True,
    }
    parameters = inspect.signature(function).parameters
    made = EXAMPLES[name].arguments(Sizes(B, N, D, 4, H, dtype))
    return function, made | {key: value for key, value in others.items() if key in parameters}


def with_value(tensor, rng):
    """A copy with one value, or all, replaced."""
    tensor, value, limits = tensor.clone(), rng.choice(INDICES), torch.iinfo(torch.uint8)
    if tensor.is_floating_point():
        value, limits = rng.choice(VALUES), torch.finfo(tensor.dtype)
    elif tensor.dtype != torch.bool:
        limits = torch.iinfo(tensor.dtype)
    value = max(min(value, limits.max), limits.min)
    if rng.random() < 0.2:
        return tensor.fill_(value)
    tensor.view(-1)[torch.randperm(tensor.numel())[: rng.choice((1, 3))]] = value
    return tensor


def hostile(value, rng):
    """Another argument in place of `value`."""
    if not torch.is_tensor(value):
        return rng.choice(NUMBERS)
    how = rng.choice(("layout", "view", "view", *["value"] * 3, "dtype", "shape", "other"))
    if how == "value":
        return with_value(value, rng)
    if how == "dtype":
        return value.to(rng.choice((*DTYPES, *OTHER_DTYPES)))
    if how == "other":
        others = (None, value.tolist(), "x" * 10**6, [0] * 10**6, value.float().numpy(), 3)
        return rng.choice(others)
    change = rng.choice({"layout": LAYOUTS, "view": VIEWS, "shape": SHAPES}[how])
    try:
        return change(value)
    except (RuntimeError, NotImplementedError, IndexError, TypeError):
        return None  # torch has no such tensor


def call(function, given):
    """The tensors that a function returns, or None if it refuses an argument by name."""
    try:
        out = function(**given)
    except (TypeError, ValueError) as error:
        names = "|".join([*given, "earlier"])
        if not re.match(rf"({names}|info(\.\w+)?|merged|num_prefix_tokens): expected ", str(error)):
            raise
        if len(str(error)) > 500:
            raise Loss(f"a message of {len(str(error))} characters: {error}") from error
        return None
    return [each for each in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(each)]


def plain(value):
    """A contiguous copy of a tensor."""
    if not torch.is_tensor(value):
        return value
    return value.detach().resolve_neg().clone(memory_format=torch.contiguous_format)


def check_close(got, expected, roundings, what):
    """Equal where not finite; elsewhere within `roundings` of the dtype and the largest value."""
    got_dtype, got = got.dtype, got.detach().double()
    eps = torch.finfo(got_dtype).eps if got_dtype.is_floating_point else 0.0
    expected = expected.detach().double()
    if got.shape != expected.shape:
        raise Loss(f"{what}: {tuple(got.shape)} is not {tuple(expected.shape)}")
    is_finite = got.isfinite() & expected.isfinite()
    same = torch.where(is_finite, 0.0, got).nan_to_num(7.0)
    if not torch.equal(same, torch.where(is_finite, 0.0, expected).nan_to_num(7.0)):
        raise Loss(f"{what}: other values are not finite: {got} is not {expected}")
    error = torch.where(is_finite, (got - expected).abs(), 0.0)
    largest = torch.where(is_finite, expected.abs(), 0.0).amax() if got.numel() else 0.0
    subnormal = 0.0 if eps == 0 else torch.finfo(got_dtype).smallest_normal * eps
    if (error > roundings * (eps * largest + subnormal)).any():
        raise Loss(f"{what}: {error.max()} away: {got} is not {expected}")


@kind(share=4)
def kernels(folder, rng):
    torch.manual_seed(rng.randrange(2**31))
    function, given = arguments(rng)
    changed = rng.choice(sorted(given))
    given[changed] = hostile(given[changed], rng)
    with torch.inference_mode(rng.random() < 0.2):
        out = call(function, given)
    if out is None:
        return "refused"
    devices = {value.device.type for value in given.values() if torch.is_tensor(value)}
    if "meta" in devices:
        if len(devices) > 1:
            raise Loss("tensors on meta and others were accepted together")
        return "read"
    expected = call(function, {name: plain(value) for name, value in given.items()})
    for i, (got, plain_one) in enumerate(zip(out, expected, strict=True)):
        check_close(got, plain_one, 64, f"{function.__name__}({changed}), output {i}")
    return "read"
