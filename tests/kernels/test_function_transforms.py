"""torch.func and forward-mode AD through the ops, against finite differences and backward."""

from functools import partial

import pytest
import torch
from torch.autograd import forward_ad

import elip_kernels
import elip_models
from tests.helpers.tiers import slow_except
from tests.helpers.towers import images, plain_vit

B, N, D = 2, 13, 8


def reduced(tokens):
    row = torch.linspace(0, 1, N, dtype=tokens.dtype).roll(5).expand(tokens.shape[0], -1)
    return elip_kernels.reduce(tokens, row, 4)


def merged(tokens):
    return elip_kernels.bipartite_merge(tokens, tokens.detach()[..., :4], 3)[0]


def nearest(tokens):
    kept = torch.arange(2, N, 3).expand(tokens.shape[0], -1)
    return elip_kernels.merge_nearest(tokens, kept, tokens.detach()[..., :4])[0]


def block(tokens):
    eye = torch.eye(D, dtype=tokens.dtype)
    lacking = dict.fromkeys(("norm_weight", "norm_bias", "q_bias"))
    return lacking | {"q_weight": eye, "k_weight": eye, "num_heads": 2, "eps": 1e-6}


def scored(tokens):
    return elip_kernels.score_reduce(tokens, tokens[:, 0], 4, **block(tokens))


OPS = [reduced, merged, nearest, scored]


@pytest.mark.parametrize("op", OPS)
def test_jvp_is_that_of_finite_differences(op):
    x, v = torch.randn(2, B, N, D, dtype=torch.float64)
    _, tangent = torch.func.jvp(op, (x,), (v,))
    if op is scored:  # the row, and so the selection and the weights, have no tangent
        row = elip_kernels.score_reduce(x, x[:, 0], 4, **block(x), return_info=True)[2]
        op = partial(elip_kernels.reduce, attn=row, keep=4)
    expected = (op(x + 1e-6 * v) - op(x - 1e-6 * v)) / 2e-6
    torch.testing.assert_close(tangent, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize("op", OPS)
def test_grad_is_that_of_backward_sample_by_sample_too(op):
    def loss(tokens):
        return op(tokens).square().sum()

    x = torch.randn(B, N, D, dtype=torch.float64, requires_grad=True)
    loss(x).backward()
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), x.grad)
    one = torch.func.grad(lambda tokens: loss(tokens[None]))
    torch.testing.assert_close(torch.func.vmap(one)(x.detach()), x.grad)


def test_vmap_with_one_text_for_all_images():
    def fused(tokens, text):
        options = block(tokens) | {"text": text, "fusion": 0.5}
        return elip_kernels.score_reduce(tokens, tokens[:, 0], 4, **options)

    x, text = torch.randn(3, B, N, D), torch.randn(1, D)
    expected = torch.stack([fused(tokens, text) for tokens in x])
    torch.testing.assert_close(torch.vmap(fused, (0, None))(x, text), expected)


@pytest.mark.parametrize("op", slow_except([], OPS))
def test_transforms_inside_a_graph_and_around_vmap(op):
    def loss(tokens):  # a graph's own input has no views under jvp
        return op(1 * tokens).square().sum()

    def through_vmap(tokens):
        return torch.func.vmap(lambda one: op(one[None])[0])(tokens).square().sum()

    x, v = torch.randn(2, B, N, D, dtype=torch.float64)
    gradient = torch.func.grad(loss)(x)
    torch.testing.assert_close(torch.func.grad(through_vmap)(x), gradient)
    torch._dynamo.reset()
    for made in (torch.func.grad(loss), lambda x: torch.func.jvp(loss, (x,), (v,))[1]):
        compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), made(x))


@pytest.mark.parametrize("op", OPS[:2])
def test_transforms_nest_as_backward_of_backward_does(op):
    def loss(tokens):
        return op(tokens).pow(3).sum()

    x = torch.randn(1, N, D, dtype=torch.float64)
    expected = torch.autograd.functional.hessian(loss, x)
    for second in (torch.func.hessian(loss), torch.func.jacrev(torch.func.grad(loss))):
        torch.testing.assert_close(second(x), expected)


@pytest.mark.parametrize("op", OPS[:2])
def test_dual_numbers_have_a_tangent(op):
    x, v = torch.randn(2, B, N, D, dtype=torch.float64)
    _, expected = torch.func.jvp(op, (x,), (v,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, v)
        torch.testing.assert_close(forward_ad.unpack_dual(op(dual)).tangent, expected)


@pytest.mark.parametrize("strategy", ["elip:merge=none", "tome", "random:merge=nearest"])
def test_a_reduced_model_has_a_tangent(strategy):
    model, x = (
        elip_models.reduce_(plain_vit().double().eval(), strategy=strategy),
        images().double(),
    )

    def features(pixels):
        torch.manual_seed(0)
        return model(pixels)

    for block in model.blocks:
        block.attn.fused_attn = False
    v = torch.randn_like(x)
    _, tangent = torch.func.jvp(features, (x,), (v,))
    expected = (features(x + 1e-6 * v) - features(x - 1e-6 * v)) / 2e-6
    torch.testing.assert_close(tangent, expected, atol=1e-5, rtol=1e-5)
