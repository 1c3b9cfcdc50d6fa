"""The strategies behind one interface: against the official tensors, in a model, at equal FLOPs."""

import pytest
import torch

import elip_models
from elip_models.reduction.inside import EViT, ToMe
from tests.test_golden import check_gradients, tower


def evit_case(golden):
    case = golden("evit")
    model = tower(case)
    weights = {n: w for n, w in case.under("sd/").items() if not n.startswith("head.")}
    model.load_state_dict(weights)
    return case, model.eval()


def run(case, model, strategy, prefix=""):
    """tokens and logits of the case's image, and gradients of its loss."""
    head = {n: case[f"sd/head.{n}"].clone().requires_grad_() for n in ("weight", "bias")}
    image = case["image"].clone().requires_grad_()
    tokens, infos = elip_models.encode_image(model, image, strategy=strategy, return_info=True)
    logits = tokens[:, 0] @ head["weight"].T + head["bias"]
    loss = (logits * case[f"{prefix}upstream/logits"]).sum()
    loss = loss + (tokens * case[f"{prefix}upstream/out_tokens"]).sum()
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    grads |= {f"head.{n}": p.grad for n, p in head.items()} | {"image": image.grad}
    return tokens, logits, infos, grads


def test_evit_reproduces_the_official_run(golden):
    case, model = evit_case(golden)
    tokens, logits, infos, grads = run(case, model, EViT(keep_rate=0.7))
    assert [info.stage.first for info in infos] == [3, 6, 9]
    for s, info in enumerate(infos):
        assert torch.equal(info.reduction.kept - 1, case[f"stage{s}/idx"].long())
        torch.testing.assert_close(
            info.attention[:, 1:], case[f"stage{s}/cls_attn"], atol=1e-6, rtol=0
        )
    torch.testing.assert_close(tokens, case["out_tokens"], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, case["logits"], atol=1e-5, rtol=0)
    check_gradients(grads, case.under("grad/"))


def test_without_attention_gradient_evit_selects_the_same(golden):
    case, model = evit_case(golden)
    tokens, _, infos, grads = run(case, model, EViT(attention_gradient=False))
    for s, info in enumerate(infos):
        assert torch.equal(info.reduction.kept - 1, case[f"stage{s}/idx"].long())
    torch.testing.assert_close(tokens, case["out_tokens"], atol=1e-5, rtol=0)
    assert not torch.allclose(grads["image"], case["grad/image"], atol=1e-4)


@pytest.mark.parametrize("prefix", ["r4/", "r8/", "r8_noprop/"])
def test_tome_reproduces_the_official_run(golden, prefix):
    case = golden("tome")
    model = tower(case)
    weights = {n: w for n, w in case.under("sd/").items() if not n.startswith("head.")}
    model.load_state_dict(weights)
    strategy = ToMe(r=int(prefix[1]), proportional="noprop" not in prefix)
    tokens, logits, infos, grads = run(case, model.eval(), strategy, prefix)
    torch.testing.assert_close(tokens, case[f"{prefix}out_tokens"], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, case[f"{prefix}logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(infos[-1].sizes, case[f"{prefix}size_final"].flatten(1))
    check_gradients(grads, case.under(f"{prefix}grad/"))
