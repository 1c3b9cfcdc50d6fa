"""Images of other sizes than the model's, and models with a changed size."""

import copy
from functools import partial

import pytest
import torch

import elip_models
from elip_models import encode_image, reduce_
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
