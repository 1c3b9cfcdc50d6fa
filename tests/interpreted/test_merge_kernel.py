"""The merge by given slots in the interpreter, against PyTorch in fp64, and its gathering rounds.

The rows contain few tokens, many, or none.
"""

import pytest
import torch

from benchmarks.kernel_analysis.traffic import traffic
from elip_kernels import launch
from elip_kernels.info import BipartiteInfo
from elip_kernels.ops.bipartite import apply_merge, merge_op, merge_reference
from tests.interpreted.test_bipartite_kernel import NAN

BLOCK_R = launch.merge_gather(2)["BLOCK_R"]
HELD = {  # tokens of each row
    "hardly any merged": [1] * 19 + [2],
    "few": [1, 3, 2, 1, 1, 5, 1, 2, 1, 1, 1, 4, 1, 1, 1, 2, 1, 1, 3],
    "all in one row": [140],
    "a row of most": [1] * 9 + [129] + [1] * 22,
    "none in some": [0, 2, 0, 0, 40, 0, 1, 0],
    "just as many as a round takes": [15, 16, 17, 31, 32, 33, 1, 0, 16],
    "many in every row": [15] * 16 + [31],
}
CASES = [(name, torch.float32) for name in HELD]
CASES += [("a row of most", torch.bfloat16), ("many in every row", torch.float16)]


def inputs(held, B=2, D=40, dtype=torch.float32):
    """Return tokens, their match in a random order for each image, and sizes from 1 to 5."""
    N, rows = sum(held), torch.repeat_interleave(torch.arange(len(held)), torch.tensor(held))
    slots = torch.stack([rows[torch.randperm(N)] for _ in range(B)]).int()
    tokens, size = torch.randn(B, N, D).to(dtype), torch.randint(1, 6, (B, N)).float()
    return tokens, BipartiteInfo(slots, len(held)), size


def merged(tokens, info, size=None):
    """Return rows, sizes, and the largest number of rounds of a program."""
    with traffic() as launches:
        out, out_size = apply_merge(tokens, info, size=size)
    assert [launch.kernel for launch in launches] == ["_order_kernel", "_merge_fwd_kernel"]
    return out, out_size, launches[1].loads["tokens"].rounds


def most_rounds(slots, num_rows):
    """Return the bound of the kernel's docstring, and the exact number, of the slowest program."""
    bounds, exact = [], []
    for image in slots.long():
        held = torch.bincount(image, minlength=num_rows)
        for tile in held.split(BLOCK_R):
            bounds.append(int(tile.sum()) // BLOCK_R + BLOCK_R - 1)
            exact.append(int((tile // BLOCK_R).sum() + (tile % BLOCK_R).max()))
    return max(bounds), max(exact)


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_rows_agree_with_fp64_within_the_rounds(launches, poisoned_memory, name, dtype):
    held = torch.tensor(HELD[name])
    tokens, info, size = inputs(HELD[name], dtype=dtype)
    for weight in (size, None):
        out, out_size, rounds = merged(tokens, info, weight)
        wide = None if weight is None else weight.double()
        right, right_size = merge_reference(tokens.double(), wide, *info[:2])
        assert torch.equal(out_size.double(), right_size)
        assert torch.equal(out[:, held == 1], right[:, held == 1].to(dtype))
        assert not out[:, held == 0].any()
        ulp = torch.finfo(dtype).eps  # the interpreter truncates to bf16
        assert ((out.double() - right).abs() <= 1e-6 + 2 * ulp * right.abs()).all()
        bound, exact = most_rounds(*info[:2])
        assert rounds == exact <= bound
    assert launches["elip::bipartite_merge"] == 2


def test_a_token_of_a_full_row_touches_no_other(launches):
    tokens, info, size = inputs(HELD["a row of most"], B=1)
    hub = info.slots[0] == 9
    tokens[0, hub.nonzero()[3]] = NAN
    out, _ = apply_merge(tokens, info, size=size)
    assert out[0, 9].isnan().all() and out[0].isnan().any(1).sum() == 1


def test_a_row_out_of_range_is_neither_read_nor_written(launches, poisoned_memory):
    tokens, info, size = inputs([3, 2, 4, 0, 2])
    good, _ = merge_op(tokens, size, info.slots, 5)
    slots = info.slots.clone()
    slots[0, slots[0] == 4] = torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32)
    leaf = tokens.clone().requires_grad_()
    out, out_size = merge_op(leaf, size, slots, 5)
    out.sum().backward()
    assert torch.equal(out[1], good[1]) and torch.equal(out[0, :4], good[0, :4])
    assert out_size[0, 4] == 0
    is_outside = (slots < 0) | (slots > 4)
    assert not leaf.grad[is_outside].any() and leaf.grad[~is_outside].all()
