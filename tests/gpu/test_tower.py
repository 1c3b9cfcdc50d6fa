"""Towers and official tensors on the device: selection, training, graph capture."""

import warnings
from collections import Counter

import pytest
import timm
import torch

import elip_models
from elip_models.user_warnings import SlowScorerWarning
from tests.gpu.ops import kernels_alone, on, pick, pytorch_forms
from tests.gpu.test_device import captured
from tests.helpers.official import tower

pytestmark = pytest.mark.gpu
SCHEDULE = "2(100%) 2(90%) 6(65%) 2(40%)"
STAGES = pick(SCHEDULE, "1(100%) 1(90%) 1(65%) 1(40%)")  # of the towers made here
SMALL = {"img_size": 64, "embed_dim": 64, "num_heads": 2, "depth": 4}
BATCH, STEPS, RATE = pick((16, 20, 3e-4), (2, 4, 3e-3))


@pytest.fixture(autouse=True)
def _full_precision():
    """Run convolutions in fp32, as matrix products; ignore warnings about costly scorers."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowScorerWarning)
        yield


def vit():
    """Return a ViT-S/16 whose attention is not uniform as in a fresh model."""
    options = pick({}, SMALL) | {"pretrained": False, "num_classes": 10}
    model = timm.create_model("vit_small_patch16_224", **options)
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.05)
    return model


def images_and_text(model):
    return torch.randn(BATCH, 3, *model.patch_embed.img_size), torch.randn(BATCH, model.embed_dim)


@pytest.mark.parametrize("scorer", ["exact", "last"])
def test_selection_of_a_tower_is_that_of_the_cpu_up_to_ties(device, launches, scorer):
    model = vit().eval()
    inputs, options = images_and_text(model), {"schedule": STAGES, "scorer": scorer}
    with torch.no_grad():
        _, exact = elip_models.encode_image(
            model.double(), *(t.double() for t in inputs), return_info=True, **options
        )
    with torch.no_grad(), kernels_alone():
        _, infos = elip_models.encode_image(
            model.float().to(device), *on(device, inputs), return_info=True, **options
        )
    alike = torch.ones(len(inputs[0]), dtype=torch.bool)  # images equal so far
    for got, right in zip(infos, exact, strict=True):
        row, exact_row = got.attention.cpu().double()[alike], right.attention[alike]
        error = (row - exact_row).abs().max()
        assert error <= 1e-5 * exact_row.max()
        kept, exact_kept = got.reduction.kept.cpu()[alike], right.reduction.kept[alike]
        least = exact_row.gather(1, exact_kept).amin(1, keepdim=True)
        assert (exact_row.gather(1, kept) >= least - 2 * error).all()
        alike[alike.clone()] = (kept == exact_kept).all(1)
    assert alike.sum() >= len(alike) // 2
    assert launches


def step(model, device):
    """Return loss and gradients of one step on fixed images."""
    torch.manual_seed(0)
    images, text = on(device, images_and_text(model))
    model.zero_grad()
    with elip_models.guidance(model, text):
        loss = model(images).square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("scorer", ["exact", "last"])
def test_gradients_of_a_tower_are_those_of_the_pytorch_form(device, launches, scorer):
    model = vit().to(device)
    elip_models.reduce_(model, schedule=STAGES, scorer=scorer)
    loss, gradients = step(model, device)
    ran = Counter(launches)
    with pytorch_forms():
        expected_loss, expected = step(model, device)
    assert ran["_reduce_bwd_kernel"] == 3 and launches == ran  # the replay launched nothing
    torch.testing.assert_close(loss, expected_loss)
    largest = max(g.abs().max() for g in expected.values())
    for name, gradient in gradients.items():
        bound = 1e-4 * max(expected[name].abs().max(), 1e-3 * largest)
        assert (gradient - expected[name]).abs().max() <= bound, name


@pytest.mark.parametrize("scorer", pick(["exact", "last"], ["last"]))
def test_a_tower_trains_under_autocast(device, launches, scorer):
    model = vit().to(device)
    elip_models.reduce_(model, schedule=STAGES, scorer=scorer)
    images, text = on(device, images_and_text(model))
    labels = torch.arange(len(images), device=device) % 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    losses = []
    for _ in range(STEPS):
        with torch.autocast(device.type, torch.bfloat16), elip_models.guidance(model, text):
            loss = torch.nn.functional.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert launches["_reduce_bwd_kernel"] == 3 * STEPS


@pytest.mark.parametrize("scorer", pick(["exact", "cls", "last"], ["cls"]))
def test_a_graph_of_a_whole_tower_replays_on_new_images(device, scorer):
    model = vit().eval().to(device)

    def run(images, text):
        tokens = elip_models.encode_image(
            model, images, text, schedule=STAGES, scorer=scorer, return_info=False
        )
        return (model.forward_head(tokens),)

    with torch.no_grad():
        still = on(device, images_and_text(model))
        graph, outputs = captured(lambda inputs: run(*inputs), still)
        for t, new in zip(still, images_and_text(model), strict=True):
            t.copy_(new)
        graph.replay()
        torch.testing.assert_close(outputs, run(*still), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scorer", pick(["official", "exact"], ["exact"]))
@pytest.mark.parametrize("name", ["elip_albef", "elip_blip"])
def test_a_tower_reproduces_official_albef_and_blip(device, golden, launches, name, scorer):
    case = golden(name)
    model = tower(case)
    model.load_state_dict(case.under("sd/"))
    model.to(device)
    image, text = on(device, (case["image"], case["text_cls"]))
    tokens, infos = elip_models.encode_image(
        model, image, text, schedule=SCHEDULE, scorer=scorer, return_info=True
    )
    for s, info in enumerate(infos):
        assert torch.equal(info.reduction.kept.cpu(), case[f"stage{s}/keep_idx"][:, 1:].long())
        right = case[f"stage{s}/cls_attn"]
        error = (info.attention[:, 1:].cpu() - right).abs().max()
        assert error <= 1e-5 * right.max()
    torch.testing.assert_close(tokens.cpu(), case["out"], atol=1e-5, rtol=1e-5)
    (tokens * case["upstream/out"].to(device)).sum().backward()
    expected = case.under("grad/")
    largest = max(g.abs().max() for g in expected.values())
    for parameter, p in model.named_parameters():
        right = expected[parameter]
        bound = 2e-5 * max(right.abs().max(), 1e-3 * largest)
        assert (p.grad.cpu().reshape(right.shape) - right).abs().max() <= bound, parameter
    moved = launches["_move_kernel" if scorer == "exact" else "_reduce_fwd_kernel"]
    assert moved == launches["_reduce_bwd_kernel"] == 3
