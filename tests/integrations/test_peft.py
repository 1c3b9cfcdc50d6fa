"""LoRA and bottlenecks in our models: trainable parameters, outputs, and errors."""

import copy
import itertools

import pytest
import torch

from elip_models.integrations.peft.adapt import (
    Bottleneck,
    adapt_,
    adapted_layer_of,
    merge_,
    trainable_counts,
    trainable_share,
)
from elip_models.integrations.peft.adapt_config import AdaptConfig
from elip_models.pretraining.training.optim import parameter_groups
from elip_models.strategies import STRATEGIES
from elip_models.strategies.spec import option_types
from tests.helpers.cross_modal_cases import batch_of_four, draws, losses, made
from tests.helpers.tiers import tiered
from tests.pretraining.models.test_clip import batch, tiny
from tests.pretraining.models.test_clip_tasks import classifier

KINDS = ("lora", "adapter")
FAMILIES = ("clip", "albef", "blip", "meter")
CASES = tiered(
    itertools.product(FAMILIES, KINDS),
    [("clip", "lora"), ("albef", "adapter")],
)
OPTIONS = {  # what a strategy asks for in a tower of 16 patches
    "tome": {"r": 1},
    "guided_tome": {"r": 1},
    "resize": {"size": 16},
}
CLOSE = {"rtol": 1e-9, "atol": 1e-12}  # fp64: some thousand roundings of 1e-16


def config(kind, **options):
    return AdaptConfig(kind=kind, **{"r": 4, "width": 4} | options)


def plain(family, **options):
    """Return a small model in fp64."""
    if family == "clip":
        return tiny(**{"scorer": "last"} | options).double()
    return made(family, **options)


def inputs_of(family):
    """Return the arguments of a training step, without random draws."""
    if family == "clip":
        inputs = batch()
        return inputs | {"images": inputs["images"].double()}
    images, ids, mask = batch_of_four()
    drawn = draws(family, images, ids, mask, "local")
    return {"images": images, "input_ids": ids, "attention_mask": mask, "drawn": drawn}


def perturbed(model):
    """Move the adapters away from zero, and reset momentum encoders, which then stay equal."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if adapted_layer_of(name):
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.reset_momentum_()
    return model


def adapted(family, kind, **options):
    return perturbed(adapt_(plain(family, **options), config(kind)))


def plain_equivalent(model):
    """Return a plain model with the same output: merged, or with the bottlenecks in hooks."""
    copied = copy.deepcopy(model)
    if model.adapted.config.kind == "lora":
        return merge_(copied)
    for name, layer in list(copied.named_modules()):
        if isinstance(layer, Bottleneck):
            parent, _, child = name.rpartition(".")
            setattr(copied.get_submodule(parent), child, layer.base_layer)
            layer.base_layer.register_forward_hook(_behind(layer.adapter_down, layer.adapter_up))
    copied.adapted = None
    return copied


def _behind(down, up):
    def hook(module, x, y):
        hidden = (y @ down.weight.T + down.bias).clamp(min=0)
        return y + hidden @ up.weight.T + up.bias

    return hook


def assert_same_step(got, expected, inputs):
    """Compare the losses of a step in training mode and in eval mode, with the same seed."""
    for mode in (True, False):
        results = []
        for model in (got, expected):
            torch.manual_seed(1)
            results.append(losses(model.train(mode)(**inputs)))
        torch.testing.assert_close(*results, **CLOSE)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_new_adapter_changes_nothing_and_a_trained_one_does(family, kind):
    model, inputs = plain(family).eval(), inputs_of(family)
    before = losses(model(**inputs))
    adapt_(model, config(kind))
    assert torch.equal(losses(model(**inputs)), before)
    assert not torch.allclose(losses(perturbed(model)(**inputs)), before, rtol=1e-3)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_step_equals_the_plain_model_with_the_same_output(family, kind):
    model = adapted(family, kind)
    assert_same_step(model, plain_equivalent(model), inputs_of(family))


EVERY = [(strategy, kind) for kind in KINDS for strategy in STRATEGIES]


@pytest.mark.filterwarnings("ignore::elip_models.user_warnings.SlowScorerWarning")
@pytest.mark.parametrize(
    ("strategy", "kind"),
    tiered(EVERY, [("tome", "lora"), ("evit", "lora"), ("trips", "adapter")]),
)
def test_a_step_equals_the_plain_model_under_every_strategy(strategy, kind):
    name = "elip_clip_tiny" if "schedule" in option_types(strategy) else "clip_tiny"
    options = {"strategy": strategy, "strategy_options": OPTIONS.get(strategy)}
    model = perturbed(adapt_(tiny(name, **options).double(), config(kind)))
    assert_same_step(model, plain_equivalent(model), inputs_of("clip"))


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_only_adapters_and_temperatures_train(family, kind):
    model = perturbed(adapt_(plain(family), config(kind)))
    model(**inputs_of(family)).loss.backward()
    gradients = {name for name, p in model.named_parameters() if p.grad is not None}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert gradients == trained
    others = {name for name in trained if not adapted_layer_of(name)}
    assert others == {"clip": {"logit_scale"}, "meter": set()}.get(family, {"temperature"})
    assert not any("_m." in name for name in trained)
    given = [p for group in parameter_groups(model, 0.1) for p in group["params"]]
    assert {id(p) for p in given} == {id(p) for p in model.parameters() if p.requires_grad}
    trained, every = trainable_counts(model)
    assert trained == sum(p.numel() for p in given)
    assert trainable_share(model) == trained / every


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_of_a_downstream_model_trains_whole(kind):
    model = adapt_(classifier(), config(kind))
    others = {n for n, p in model.named_parameters() if p.requires_grad and not adapted_layer_of(n)}
    assert others == {"head.weight", "head.bias"}
    model = adapt_(classifier(), config(kind, full=("visual.norm.*", "head.weight")))
    others = {n for n, p in model.named_parameters() if p.requires_grad and not adapted_layer_of(n)}
    assert others == {"visual.norm.weight", "visual.norm.bias", "head.weight"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["albef", "blip"])
def test_momentum_adapters_follow_the_online_ones(family, kind):
    model = perturbed(adapt_(plain(family), config(kind, full=("encoders.image_projection.*",))))
    online = dict(model.encoders.named_parameters())
    followed = {name: p.detach().clone() for name, p in online.items()}
    model.reset_momentum_()
    for _ in range(3):
        for name, parameter in online.items():
            followed[name] = 0.5 * followed[name] + 0.5 * parameter.detach()
        model(**inputs_of(family)).loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.optim.SGD(trained, lr=0.1).step()
    for name, parameter in model.encoders_m.named_parameters():
        torch.testing.assert_close(parameter, followed[name], **CLOSE)
        moves = adapted_layer_of(name) or name.startswith("image_projection")
        assert torch.equal(parameter, online[name]) != bool(moves)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ("qvk",)}, r"target_modules: expected .* matches nothing"),
        ({"target_modules": r".*\.attn"}, r"linear layers in CLIP.*visual\.blocks\.0\.attn"),
        ({"target_modules": ("image_projection",)}, "whose weight CLIP also uses elsewhere"),
        ({"full": ("haed.*",)}, r"full: expected patterns .*haed"),
        ({"target_modules": "("}, r"target_modules: expected a regular expression.* got '\('"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_targets_and_patterns_that_do_not_match_raise(kind, options, message):
    model = plain("clip")
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        adapt_(model, config(kind, **options))
    assert list(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())
