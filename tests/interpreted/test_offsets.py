"""Offsets beyond 2^31 elements without the memory: only the last image of a huge batch is stored.

Tensors of the batch have a shape and an address. `LastImage` runs the programs of the last image
and redirects accesses to its rows; any other access raises. The results must equal those of the
same image in a batch of one.
"""

from contextlib import ExitStack
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from benchmarks.kernel_analysis.traffic import Memory
from elip_kernels._operator import OPERATORS

B = 2**31 - 15  # the last program of 16 images has one; 2 B elements exceed 2^31
N, D, H, K = 19, 24, 2, 7
BACKWARDS = {"_move_kernel", "_weigh_kernel"}  # their first program has the last image


class LastImage:
    """Run kernels on meta tensors (B, ...), of which only the last image has memory."""

    def __init__(self):
        self.images = {}  # by batch: the last image (1, ...)
        self.placed = []  # (address of the batch, tensor of the batch, its last image)
        self.shared = []  # addresses of what all images share

    def batch_of(self, image):
        """Return a tensor (B, ...) on meta whose last image is `image` (1, ...)."""
        shape, stride = (B, *image.shape[1:]), image.stride()
        batch = torch.empty_strided(shape, stride, dtype=image.dtype, device="meta")
        self.place(batch, image)
        return batch

    def image_of(self, batch):
        """Return the last image (1, ...), zeros if the launcher allocated the batch."""
        if _key(batch) not in self.images:
            self.place(batch, torch.zeros(1, *batch.shape[1:], dtype=batch.dtype))
        return self.images[_key(batch)]

    def place(self, batch, image):
        self.images[_key(batch)] = image
        self.placed.append(((len(self.placed) + 1) << 50, batch, image))

    def pointer(self, argument):
        """Return what the interpreter accepts as a pointer."""
        if not torch.is_tensor(argument):
            return argument
        if not argument.is_meta:
            start = argument.data_ptr()
            self.shared.append((start, start + argument.numel() * argument.element_size()))
            return argument
        image = self.image_of(argument)
        start = next(start for start, _, i in self.placed if i is image)
        return SimpleNamespace(dtype=argument.dtype, data_ptr=lambda: start)

    def visit(self, kind, pointers, mask):
        """Translate addresses of the last image to its memory."""
        lanes = np.broadcast_to(mask, pointers.shape).astype(bool)
        real, is_found = pointers.copy(), ~lanes
        for start, batch, image in self.placed:
            first = start + (len(batch) - 1) * batch.stride(0) * batch.element_size()
            offset = (pointers.astype(np.int64) - first) // batch.element_size()
            is_mine, element = _elements(offset, batch, image)
            is_mine &= lanes
            address = image.data_ptr() + element * batch.element_size()
            real[is_mine] = address[is_mine].astype(np.uint64)
            is_found |= is_mine
        for start, end in self.shared:
            is_found |= (start <= pointers) & (pointers < end)
        if not is_found.all():
            raise IndexError(f"{kind} of {(~is_found).sum()} lanes outside the last image")
        return real

    def __enter__(self):
        executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
        execute, move_on = executor.__call__, builder.set_grid_idx

        def last_programs(self, *args, **kwargs):
            images, *rest = self.grid
            self.grid = (1, *rest)
            last = 0 if self.fn.__name__ in BACKWARDS else images - 1

            def move_to_last(builder, x, y, z):
                builder.set_grid_dim(images, *builder.grid_dim[1:])
                move_on(builder, last, y, z)

            with patch.object(builder, "set_grid_idx", move_to_last):
                execute(self, *args, **kwargs)

        def to_pointers(executor, args, kwargs):
            return [self.pointer(a) for a in args], {n: self.pointer(v) for n, v in kwargs.items()}

        memory = Memory(interpreter._interpreter, self.visit)
        with ExitStack() as stack:
            stack.enter_context(patch.object(interpreter, "_interpreter", memory))
            stack.enter_context(patch.object(executor, "__call__", last_programs))
            stack.enter_context(patch.object(executor, "_init_args_hst", to_pointers))
            stack.enter_context(patch.object(executor, "_restore_args_dev", lambda *args: None))
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        self.stack.close()


def _key(batch):
    """Return a key that distinguishes tensors of a batch, including views of one storage."""
    return batch.untyped_storage()._cdata, batch.storage_offset()


def _elements(offset, batch, image):
    """Return which offsets are elements of the last image, and their offsets in `image`."""
    is_mine, element = offset >= 0, np.zeros_like(offset)
    sizes = zip(batch.shape[1:], batch.stride()[1:], image.stride()[1:], strict=True)
    for size, stride, image_stride in sorted(sizes, key=lambda dim: -dim[1]):
        index, offset = np.divmod(offset, stride)
        is_mine &= index < size
        element += index * image_stride
    return is_mine & (offset == 0), element


def launcher(name):
    """Return the function that launches the kernels of an op."""
    return OPERATORS[name].launcher


def check(run, *arguments, shared=()):
    """Check that the last image of a huge batch gives its result; `shared` arguments are last."""
    expected = run(*arguments, *shared)
    with LastImage() as last:
        batches = [last.batch_of(a) if torch.is_tensor(a) else a for a in arguments]
        batches += shared
        got = run(*batches)
    single = torch.is_tensor(got)
    got, expected = ([got], [expected]) if single else (got, expected)
    for batch, right in zip(got, expected, strict=True):
        assert batch.shape == (B, *right.shape[1:]) and batch.numel() > 2**31
        assert torch.equal(last.image_of(batch), right)


@pytest.fixture
def scored():
    """Return tokens (1, N, D) and scores (1, N-1)."""
    return torch.randn(1, N, D), torch.rand(1, N - 1)


@pytest.mark.parametrize("masked", [False, True])
def test_reduce(scored, masked):
    mask = torch.rand(1, N) > 0.3 if masked else None
    check(launcher("reduce"), *scored, mask, K, 1, True)


def test_reduce_of_strided_tokens(scored):
    tokens = torch.randn(1, N, 2 * D)[..., :D]
    check(launcher("reduce"), tokens, scored[1], None, K, 2, True)


def test_reduce_backward(scored):
    _, _, weights, slots = launcher("reduce")(*scored, None, K, 1, True)
    check(launcher("reduce_backward"), torch.randn(1, K + 2, D), slots, weights, True)


@pytest.mark.parametrize("heads", [H, 3 * H])
def test_generic_row(heads):
    q, k = torch.randn(1, heads, D), torch.randn(1, H, N, D)
    check(launcher("cls_attention"), q, k, torch.rand(1, N) > 0.3, 0.5)


def test_attention_received():
    q, k = torch.randn(1, 2 * H, N + 30, D), torch.randn(1, H, N, D)
    mask, query_mask = torch.rand(1, N) > 0.3, torch.rand(1, N + 30) > 0.3
    check(launcher("attention_column_mean"), q, k, mask, query_mask, 0.5)
    check(launcher("attention_column_mean"), q, k, None, None, 0.5)


@pytest.mark.parametrize("masked", [False, True])
def test_selections(masked):
    tokens, relevance = torch.randn(1, N, D), torch.rand(1, N)
    mask, first = (relevance > 0.3, torch.tensor([5])) if masked else (None, None)
    check(launcher("select_diverse"), tokens, mask, first, K)
    check(launcher("select_dpp"), tokens, relevance if masked else None, mask, K)


def test_generic_row_of_keys_head_by_head():
    """Layout (H, B, N, d): one head has fewer than 2^31 elements, three have more."""
    images = 2**31 // (N * D)
    q, k = torch.randn(1, 4, D), torch.randn(1, 4, N, D)
    run = launcher("cls_attention")
    with LastImage() as last:
        layout = torch.empty(4, images, N, D, device="meta").transpose(0, 1)
        last.place(layout, k)
        batch = torch.empty(images, 4, D, device="meta")
        last.place(batch, q)
        row = run(batch, layout, None, 0.5)
    assert torch.equal(last.image_of(row), run(q, k, None, 0.5))


def absorbed(*more):
    """Return cls and text of the last image, then the arguments that all images share."""
    (gamma, beta, bias), matrices = torch.randn(3, D), torch.randn(2, D, D)
    query = (True, gamma, beta, 1e-6, matrices[0], bias, matrices[1], H, 0.3)
    return (*torch.randn(2, 1, D), 0.7), (*query, *more)


def test_row_from_tokens(scored):
    of_image, shared = absorbed()
    run = launcher("cls_attention_from_tokens")
    check(run, scored[0].bfloat16(), *of_image, shared=shared)


def test_attention_output(scored):
    of_image, shared = absorbed(torch.randn(D, D), torch.randn(D))
    run = launcher("cls_attention_output")
    check(run, scored[0].bfloat16(), *of_image, shared=shared)


def test_score_reduce(scored):
    of_image, shared = absorbed(K, True, None, None)
    check(launcher("score_reduce"), scored[0].bfloat16(), *of_image, shared=shared)


@pytest.mark.parametrize("has_penalty", [False, True])
def test_bipartite_match(scored, has_penalty):
    penalty = torch.rand(1, N) if has_penalty else None
    check(launcher("bipartite_match"), torch.randn(1, N, 8), penalty, 5, 1)


def test_nearest(scored):
    kept = launcher("select")(torch.rand(1, N - 1), None, 6, 1)
    check(launcher("select"), torch.rand(1, N - 1), torch.rand(1, N - 1) < 0.7, 6, 1)
    check(launcher("nearest_match"), torch.randn(1, N, 8), kept, 1)
    slots = launcher("nearest_match")(torch.randn(1, N, 8), kept, 1)
    check(launcher("bipartite_merge"), scored[0], torch.rand(1, N) + 1, slots, 7)


@pytest.mark.parametrize("has_size", [False, True])
def test_bipartite_merge_and_backward(scored, has_size):
    merge = launcher("bipartite_merge")
    slots = launcher("bipartite_match")(torch.randn(1, N, 8), None, 5, 1)
    size = torch.rand(1, N) + 1 if has_size else None
    check(merge, scored[0], size, slots, N - 5)
    _, out_size = merge(scored[0], size, slots, N - 5)
    check(launcher("bipartite_merge_backward"), torch.randn(1, N - 5, D), size, out_size, slots)


@triton.jit
def _copy_kernel(
    x_ptr, out_ptr, N, WIDE: tl.constexpr, TOO_MANY: tl.constexpr, BLOCK: tl.constexpr
):
    pid_b = tl.program_id(0)
    if WIDE:
        pid_b = pid_b.to(tl.int64)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + pid_b * N + offs, mask=offs < N)
    tl.store(out_ptr + pid_b * N + offs, x, mask=offs < N + TOO_MANY)


def _copy(x, wide, too_many):
    out = torch.empty_like(x)
    _copy_kernel[(len(x),)](x, out, x.shape[1], WIDE=wide, TOO_MANY=too_many, BLOCK=32)
    return out


@pytest.mark.parametrize(
    ("wide", "too_many", "error"),
    [(False, 0, "outside the last image|overflow"), (True, 1, "store of 1 lanes outside")],
)
def test_int32_offsets_and_other_rows_raise(wide, too_many, error):
    image = torch.rand(1, 19)
    check(_copy, image, True, 0)
    with pytest.raises(interpreter.InterpreterError, match=error):
        check(_copy, image, wide, too_many)
