"""What every op guarantees of its kernels in the interpreter, tested with its example."""

import pytest
import torch

from elip_kernels._example import EXAMPLES, Sizes, map_tensors
from elip_kernels.testing import WITH_KERNELS
from elip_kernels.testing.__main__ import SMALL_SHAPE, check


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_kernels_pass(name, dtype):
    _, _, form, _, _, passed = check(name, dtype, torch.device("cpu"), SMALL_SHAPE)
    assert passed == "yes"
    assert form == ("kernels" if EXAMPLES[name].has_kernels else "PyTorch")


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_an_image_has_the_same_bits_alone_and_among_others(launches, name):
    """The image is the first in a tile of 16: on the CPU, unlike in tensor cores, the last bit of a
    product depends on its row in the tile.
    """
    sizes = Sizes(B=17, N=21, D=32, K=12, H=2, dtype=torch.float16)
    arguments = EXAMPLES[name].arguments(sizes)
    alone = map_tensors(lambda t: t[16:] if len(t) == sizes.B else t, arguments)
    whole, one = (EXAMPLES[name].outputs(inputs) for inputs in (arguments, alone))
    assert launches and all(torch.equal(a[16:], b) for a, b in zip(whole, one, strict=True))
