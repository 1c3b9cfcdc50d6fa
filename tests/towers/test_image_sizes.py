"""Images of other sizes than the model's, and models with a changed size."""

import copy
from functools import partial

import pytest
import torch

import elip_models
from elip_models import encode_image, reduce_
from elip_models.strategies import ImageResize
from elip_models.towers import as_tower
from tests.engine.test_dense_outputs import STRATEGIES
from tests.helpers.models import ROTARY, TOWERS, eva
from tests.helpers.tiers import slow_except, tiered
from tests.helpers.towers import (
    SCHEDULE,
    assert_equal_gradients,
    gradients,
    images,
    plain_vit,
    text,
)

OTHER = (64, 40)  # 8 x 5 patches of 8 pixels, where the models are made for 6 x 6
HF = [name for name in TOWERS if name.startswith("HF")]


def pictures(size=OTHER):
    return torch.randn(2, 3, *size)


def dynamic_vit(**options):
    return plain_vit(dynamic_img_size=True, **options).eval()


DINOV3 = {"rope_type": "dinov3", "rope_rotate_half": True, "use_abs_pos_emb": False}
DYNAMIC = {"timm": plain_vit, "EVA-02": eva, "DINOv3": partial(eva, **DINOV3)}
IN_EACH = [(make, strategy) for make in DYNAMIC for strategy in STRATEGIES]


@pytest.mark.parametrize(
    ("name", "strategy"),
    slow_except([(n, s) for n, s in IN_EACH if n == "timm" or s in ("elip", "dropping")], IN_EACH),
)
def test_a_dynamic_model_is_reduced_as_one_made_for_the_size(name, strategy):
    """The table of a rotary model made for one size may be rounded in another order."""
    make, settings = DYNAMIC[name], STRATEGIES[strategy]
    close = 1e-5 if name == "timm" else 1e-4
    dynamic = make(dynamic_img_size=True).eval()
    reduced = reduce_(copy.deepcopy(dynamic), **settings)
    for size in (OTHER, (48, 48)):
        x, made = pictures(size), make().eval()
        made.load_state_dict(dynamic.state_dict())
        made.set_input_size(size)
        torch.testing.assert_close(reduced(x), reduce_(made, **settings)(x), atol=close, rtol=close)
        cls = encode_image(dynamic, x, **settings)[:, 0]
        torch.testing.assert_close(reduced.forward_features(x)[:, 0], cls, atol=1e-6, rtol=1e-6)


def test_a_model_that_moves_its_positions_in_training_uses_one_draw_a_pass():
    model = eva(rope_shift_coords=0.4, rope_jitter_coords=1.5, **DINOV3).train()
    x = pictures((48, 48))
    torch.manual_seed(3)
    dense = model(x)
    reduce_(model, strategy="elip", schedule="5(100%) 1(97%)", merge="nearest")
    torch.manual_seed(3)
    torch.testing.assert_close(model(x), dense, atol=0.1, rtol=0)
    reduce_(model, strategy="tome:r=3")
    torch.manual_seed(3)
    first = model(x)
    assert not torch.equal(first, model(x))
    torch.manual_seed(3)
    assert torch.equal(first, model(x))


@pytest.mark.parametrize("library", HF)
@pytest.mark.parametrize("strategy", tiered(["elip", "evit"], ["elip"]))
def test_transformers_interpolates_the_positions_of_a_reduced_model(library, strategy):
    model, x = TOWERS[library]().eval(), pictures()
    dense = model(x, interpolate_pos_encoding=True)
    reduce_(model, schedule="6(100%)")
    same = model(x, interpolate_pos_encoding=True)
    assert all(torch.equal(a, b) for a, b in zip(same.values(), dense.values(), strict=True))
    reduce_(model, **STRATEGIES[strategy])
    with elip_models.record_stages(model) as infos:
        model(x, interpolate_pos_encoding=True)
    settings = elip_models.reduction_summary(model).strategy
    elip_models.unreduce_(model)
    _, others = encode_image(model, x, strategy=settings, return_info=True)
    assert infos[0].reduction.weights.shape[1] in (1 + 40, 2 + 40, 4 + 40)
    for info, other in zip(infos, others, strict=True):
        assert torch.equal(info.reduction.kept, other.reduction.kept)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "backend"), [("elip", "eager"), ("evit", "aot_eager")])
def test_a_compiled_model_takes_images_of_two_sizes(strategy, backend):
    torch._dynamo.reset()
    settings = dict(STRATEGIES[strategy])
    settings |= {"schedule": "1(100%) 1(50%)"} if "schedule" in settings else {}
    model = reduce_(dynamic_vit(depth=2), **settings)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for x in (images(), pictures(), images()):
        torch.testing.assert_close(compiled(x), model(x))
    model(x).square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    compiled(x).square().sum().backward()
    assert_equal_gradients(gradients(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (plain_vit, "dynamic_img_size=True"),
        (ROTARY["EVA without rotation"], "dynamic_img_size=True"),
        (ROTARY["rope"], "dynamic_img_size=True"),
        (TOWERS["open_clip"], "resize the images"),
    ],
)
def test_a_model_of_one_size_raises_with_advice(make, advice):
    with pytest.raises(ValueError, match=f"48, 48.*64, 40.*{advice}"):
        encode_image(make(), pictures(), text(), schedule=SCHEDULE)


def test_blocks_that_get_other_token_counts_raise():
    model = reduce_(plain_vit(), schedule=SCHEDULE)
    with pytest.raises(ValueError, match=r"expected 37 tokens before block 1, .*got 20"):
        model.blocks(torch.randn(2, 20, 32))


@pytest.mark.parametrize("name", ROTARY)
@torch.no_grad()
def test_resize_rotates_patches_by_their_place_in_the_smaller_image(name):
    model, x = ROTARY[name]().eval(), images()
    smaller = copy.deepcopy(model)
    smaller.set_input_size((32, 32))
    strategy = ImageResize(32)
    expected = smaller(strategy.resize(as_tower(model), x))
    found = encode_image(model, x, strategy=strategy)
    assert found.shape[1] == model.num_prefix_tokens + 16
    torch.testing.assert_close(reduce_(model, strategy=strategy)(x), expected)
    elip_models.unreduce_(model)
    torch.testing.assert_close(model.forward_head(found), expected)
