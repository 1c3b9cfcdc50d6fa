"""reduce_, unreduce_ and guidance on a timm model."""

import copy
import warnings

import pytest
import torch

import elip_models
from elip_models import user_warnings
from elip_models.api import is_reduced
from elip_models.towers import as_tower
from tests.helpers.models import eva, open_clip_vit, output, siglip_vision
from tests.helpers.own_warnings import UNGUIDED
from tests.helpers.tiers import first_quick
from tests.helpers.towers import (
    SCHEDULE,
    assert_equal_gradients,
    clip_vit,
    gradients,
    gradients_of_a_step,
    images,
    plain_vit,
    text,
)


@pytest.fixture(params=[plain_vit, clip_vit], ids=["plain", "clip"])
def model(request):
    return request.param()


def test_second_call_replaces_the_settings(model):
    elip_models.reduce_(model, schedule="2(100%) 4(30%)", scorer="exact")
    elip_models.reduce_(model, schedule=SCHEDULE, fusion=0.5)
    x, t = images(), text()
    with elip_models.guidance(model, t):
        got = model(x)
    elip_models.unreduce_(model)
    tokens = elip_models.encode_image(model, x, t, schedule=SCHEDULE, scorer="last", fusion=0.5)
    assert torch.equal(got, model.forward_head(tokens))


def test_encode_image_raises_for_a_reduced_model(model):
    elip_models.reduce_(model, schedule=SCHEDULE)
    with pytest.raises(ValueError, match="unreduce_"):
        elip_models.encode_image(model, images(), schedule=SCHEDULE)


def test_guidance_looks_through_data_parallel_wrappers(model, free_port):
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{free_port}", rank=0, world_size=1
    )
    try:
        elip_models.reduce_(model, schedule=SCHEDULE, fusion=0.2)
        x, t = images(), text()
        expected = gradients_of_a_step(model, x, t)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        with elip_models.guidance(wrapped, t):
            out = wrapped(x)
        model.zero_grad()
        out.square().sum().backward()
        assert_equal_gradients(gradients(model), expected, rtol=1e-5, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("settings", ["elip:scorer=exact", "elip:scorer=cls"])
def test_bf16_autocast_gives_every_weight_its_gradient(model, settings):
    """The training pass must not use a weight that the scorer cast without gradient."""
    x, t = images(), text()
    elip_models.reduce_(model, settings, schedule=SCHEDULE)
    with torch.autocast("cpu", torch.bfloat16), elip_models.guidance(model, t):
        loss = model(x).square().sum()
    loss.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not missing


@pytest.mark.parametrize("how", [torch.compile, lambda m: (m.compile(), m)[1]])
def test_a_compiled_model_raises(model, how):
    compiled = how(model)
    for change in (lambda m: elip_models.reduce_(m, schedule=SCHEDULE), elip_models.unreduce_):
        with pytest.raises(TypeError, match="on the original module, then compile it"):
            change(compiled)


@pytest.mark.parametrize("strategy", first_quick(["tome", "elip", "resize"]))
def test_torch_fx_raises_until_the_reduction_is_undone(model, strategy):
    elip_models.reduce_(model.eval(), strategy=strategy, keep=0.6)
    with pytest.raises(TypeError, match=r"before reduce_ for torch\.fx .*or use torch\.export"):
        torch.fx.symbolic_trace(model)
    x = images()
    expected = elip_models.unreduce_(model)(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)


@UNGUIDED
@pytest.mark.parametrize("make", [plain_vit, open_clip_vit, eva, siglip_vision])
def test_a_block_that_is_used_twice_raises_and_nothing_changes(make):
    model, x = make().eval(), images()
    blocks = as_tower(model).blocks
    blocks[4] = blocks[1]
    expected = output(model, x)
    with pytest.raises(TypeError, match=r"block 4 that is block 1 again; give it a copy\.deepcopy"):
        elip_models.reduce_(model, schedule=SCHEDULE)
    assert not is_reduced(model)
    assert torch.equal(output(model, x), expected)
    blocks[4] = copy.deepcopy(blocks[1])
    output(elip_models.reduce_(model, schedule=SCHEDULE), x)
    assert torch.equal(output(elip_models.unreduce_(model), x), expected)


def test_guidance_is_scoped_and_ends_in_any_order(model):
    elip_models.reduce_(model.eval(), schedule=SCHEDULE, fusion=0.2)
    x = images()
    plain = model(x)
    first, second = (elip_models.guidance(model, text()) for _ in range(2))
    with pytest.raises(ZeroDivisionError), first:
        by_first = model(x)
        with elip_models.guidance(model, text()):
            assert not torch.equal(model(x), by_first)
        assert torch.equal(model(x), by_first)
        second.__enter__()
        by_second = model(x)
        raise ZeroDivisionError
    assert torch.equal(model(x), by_second) and not torch.equal(by_second, plain)
    second.__exit__(None, None, None)
    assert torch.equal(model(x), plain)


def test_a_scorer_that_costs_more_than_it_saves_warns_once(model):
    user_warnings.warn_again()
    elip_models.reduce_(model, schedule="1(100%) 1(90%) 4(80%)", scorer="exact")
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images())
    model.eval()
    with pytest.warns(UserWarning, match=r"cost 1\.\d\d times"):
        model(images())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images())
        elip_models.reduce_(model, schedule="1(100%) 1(90%) 4(80%)", scorer="last")
        model(images())


def test_other_settings_raise_inside_guidance_and_record_stages():
    """Otherwise the open contexts would guide and record nothing."""
    model = elip_models.reduce_(plain_vit().eval(), schedule=SCHEDULE)
    for held in (elip_models.guidance(model, text()), elip_models.record_stages(model)):
        with held:
            elip_models.reduce_(model, schedule=SCHEDULE)  # as it is already
            with pytest.raises(RuntimeError, match=r"outside of guidance, budget and record"):
                elip_models.reduce_(model, schedule="3(100%) 3(40%)")
    elip_models.reduce_(model, schedule="3(100%) 3(40%)")
    with elip_models.record_stages(model) as infos:
        model(images())
    assert len(infos) == 1
