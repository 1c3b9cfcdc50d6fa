"""Time of CLS attention, its output, a whole stage boundary and the attention that tokens receive.

Each is compared with the official and the eager form that it replaces, and with a copy.
"""

from functools import partial

import pytest
import torch

import elip_kernels
from benchmarks.cases import DEVICE, HEADS, described, sweep
from benchmarks.comparison import compare
from benchmarks.kernel_analysis import least_work
from benchmarks.parity import OURS, in_fp64, on_device, parity, with_compiled
from benchmarks.replaced_forms import (
    EPS,
    attention_row,
    column_means,
    eager_output,
    eager_reduce,
    eager_row,
    official_output,
    official_reduce,
    official_row,
    parameters,
)

IMAGES = 4  # compared with fp64: the first and last images


def tupled(function, **arguments):
    """Wrap a function as a form of one output."""
    return lambda *inputs: (function(*inputs, **arguments),)


def absorbed(p, *more):
    """Name the parameters as the absorbed forms take them."""
    names = ("norm_weight", "norm_bias", "q_weight", "q_bias", "k_weight", *more)
    return {name: p[name] for name in names} | {"eps": EPS, "num_heads": HEADS}


def row_forms(p, case):
    ours = tupled(elip_kernels.cls_attention_from_tokens, **absorbed(p))
    return {"official": tupled(official_row, p=p), "eager": tupled(eager_row, p=p), OURS: ours}


def output_forms(p, case):
    ours = tupled(elip_kernels.cls_attention_output, **absorbed(p, "v_weight", "v_bias"))
    return {
        "official": tupled(official_output, p=p),
        "eager": tupled(eager_output, p=p),
        OURS: ours,
    }


def boundary_forms(p, case):
    """Make forms of a whole stage boundary -> (row, reduced tokens)."""

    def of(score, reduce, tokens, cls):
        row = score(tokens, cls, p)
        return row, reduce(tokens, row[:, 1:], case.K)

    def ours(tokens, cls):
        out, _, row = elip_kernels.score_reduce(
            tokens, cls, case.K, **absorbed(p), return_info=True
        )
        return row, out

    official = partial(of, official_row, official_reduce)
    return {"official": official, "eager": partial(of, eager_row, eager_reduce), OURS: ours}


OPS = {
    "cls_attention_from_tokens": (row_forms, least_work.cls_attention_from_tokens),
    "cls_attention_output": (output_forms, least_work.cls_attention_output),
    "score_reduce": (boundary_forms, least_work.score_reduce),
}


@pytest.mark.cases(case=sweep)
@pytest.mark.parametrize("op", OPS)
def test_from_tokens(record, rounds, op, case):
    make, work = OPS[op]
    p = parameters(case.D, case.dtype, DEVICE)
    tokens, cls = case.inputs()[0], torch.randn(case.B, case.D).to(case.dtype)
    inputs = on_device((tokens, cls))
    precise = make({name: value.double() for name, value in p.items()}, case)["official"]
    exact = precise(*in_fp64(inputs, IMAGES))[:1]
    forms, left_out = with_compiled(make(p, case), case, inputs)
    outputs = {name: form(*inputs) for name, form in forms.items()}
    checked = parity(exact, {name: output[:1] for name, output in outputs.items()})
    if (
        op == "score_reduce"
    ):  # compare the selection from our fp32 row; 16-bit rows of other forms have ties
        row, out = outputs[OURS]
        moved = official_reduce(inputs[0].double(), row[:, 1:].double(), case.K)
        same = eager_reduce(inputs[0], row[:, 1:], case.K)
        parity((moved,), {"eager": (same,), OURS: (out,)})
    shape = [case.B, case.N, case.D, HEADS]
    if op == "score_reduce":
        shape.insert(3, case.K)
    facts, step = compare(
        forms, inputs, work(*shape, case.dtype), direction="forward", rounds=rounds
    )
    facts |= described(case, **({} if op == "score_reduce" else {"H": HEADS}))
    record(step, **facts, op=op, parity=checked, left_out=left_out)


@pytest.mark.cases(case=sweep)
def test_cls_attention(record, rounds, case):
    B, N, d = case.B, case.N, case.D // HEADS
    q, k = torch.randn(B, HEADS, d), torch.randn(B, HEADS, N, d)
    inputs = on_device((q.to(case.dtype), k.to(case.dtype)))
    forms = {"eager": tupled(attention_row), OURS: tupled(elip_kernels.cls_attention)}
    exact = forms["eager"](*in_fp64(inputs, IMAGES))
    forms, left_out = with_compiled(forms, case, inputs)
    checked = parity(exact, {name: form(*inputs) for name, form in forms.items()})
    work = least_work.cls_attention(B, HEADS, N, d, case.dtype)
    facts, step = compare(forms, inputs, work, direction="forward", rounds=rounds)
    facts |= described(case, H=HEADS)
    record(step, **facts, op="cls_attention", parity=checked, left_out=left_out)


@pytest.mark.cases(case=sweep)
def test_attention_received(record, rounds, case):
    B, N, d = case.B, case.N, case.D // HEADS
    inputs = on_device(tuple(torch.randn(B, HEADS, N, d).to(case.dtype) for _ in "qk"))
    ours = tupled(elip_kernels.attention_column_mean)
    forms = {"eager": tupled(column_means), OURS: ours}
    exact = forms["eager"](*in_fp64(inputs, IMAGES))
    forms, left_out = with_compiled(forms, case, inputs)
    outputs = {name: form(*inputs) for name, form in forms.items()}
    checked = parity(exact, outputs, summed=HEADS * N)
    work = least_work.attention_column_mean(B, HEADS, HEADS, N, N, d, case.dtype)
    facts, step = compare(forms, inputs, work, direction="forward", rounds=rounds)
    facts |= described(case, H=HEADS)
    record(step, **facts, op="attention_column_mean", parity=checked, left_out=left_out)
