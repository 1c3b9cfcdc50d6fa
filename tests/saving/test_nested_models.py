"""Models inside models: each function acts on the model that was passed, and its own tower."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import elip_models
from elip_models import guidance, is_reduced, record_stages, reduce_, reduction_summary, unreduce_
from tests.helpers.models import hf_clip, hf_vision, open_clip_pair
from tests.helpers.towers import WIDTH, images, plain_vit
from tests.vlm.models import build


def classifier():
    return hf_vision("ViTForImageClassification", "ViTConfig", num_labels=5)


MODELS = {
    "timm": plain_vit,
    "open_clip": open_clip_pair,
    "HF": classifier,
    "HF pair": hf_clip,
    "LLaVA": lambda: build("llava")[0],
}
OTHER = {"timm": "HF", "open_clip": "timm", "HF": "LLaVA", "HF pair": "HF pair", "LLaVA": "timm"}
STRATEGIES = {"LLaVA": "diverse"}


def strategies(model):
    return elip_models.api.strategies_in(model)


@pytest.fixture(params=MODELS)
def nested(request):
    """A student, its reduced teacher, and the names of their strategies."""
    name = request.param
    student, teacher = MODELS[name]().eval(), MODELS[OTHER[name]]().eval()
    reduce_(teacher, STRATEGIES.get(OTHER[name], "tome"), 0.7)
    student.teacher = teacher
    return student, teacher, STRATEGIES.get(name, "tome")


def test_student_is_reduced_beside_its_teacher(nested):
    student, teacher, strategy = nested
    of_teacher = strategies(teacher)
    assert not is_reduced(student) and str(reduction_summary(student)).count("dense")
    with pytest.raises(ValueError, match="model: expected one that reduce_ has changed"):
        record_stages(student).__enter__()
    for keep in (0.7, 0.5):  # the first is the teacher's own
        reduce_(student, strategy, keep)
        (of_student,) = strategies(student)
        assert of_student.name == strategy and strategies(teacher) == of_teacher
        (alone,) = strategies(reduce_(MODELS_BY_TYPE[type(student)](), strategy, keep))
        assert of_student == alone
    unreduce_(student)
    assert not is_reduced(student) and strategies(teacher) == of_teacher
    reduce_(student, strategy, 0.7)
    unreduce_(teacher)
    assert is_reduced(student) and not is_reduced(teacher)


MODELS_BY_TYPE = {type(make()): make for make in MODELS.values()}


def test_teacher_keeps_its_output(nested):
    student, teacher, strategy = nested
    tower = getattr(teacher, "vision_model", teacher)
    inputs = build("llava")[1] if hasattr(teacher, "generate") else {"args": images()}

    def output():
        got = tower(**inputs) if "args" not in inputs else tower(inputs["args"])
        return got if isinstance(got, torch.Tensor) else got[0]

    with torch.no_grad():
        expected = output()
        for change in (lambda: reduce_(student, strategy, 0.5), lambda: unreduce_(student)):
            change()
            assert torch.equal(output(), expected)


AVERAGES = {
    "deepcopy": copy.deepcopy,
    "ModelEmaV2": timm.utils.ModelEmaV2,
    "ModelEmaV3": timm.utils.ModelEmaV3,
    "AveragedModel": AveragedModel,
}


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
def test_average_of_the_weights_has_its_own_reduction(average):
    model, x = reduce_(plain_vit(), "tome", 0.7).eval(), images()
    model.ema = average(model)
    of_ema, expected = strategies(model.ema), model(x)
    reduce_(model, "evit", 0.5)
    assert strategies(model)[0].name == "evit" and strategies(model.ema) == of_ema
    assert torch.equal(model.ema(x) if average is AveragedModel else ema(model)(x), expected)
    assert is_reduced(unreduce_(model).ema)
    assert not is_reduced(unreduce_(model.ema))


def ema(model):
    return getattr(model.ema, "module", model.ema)


WRAPPERS = {
    "Sequential": nn.Sequential,
    "ModuleList": lambda model: nn.ModuleList([model]),
    "siamese": lambda model: nn.ModuleDict({"left": model, "right": model}),
    "AveragedModel": AveragedModel,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapper_stands_for_the_one_model_inside(wrap):
    model = reduce_(plain_vit(), "elip", fusion=0.5)
    model.teacher = reduce_(plain_vit(), "tome")
    wrapper = wrap(model)
    inner = wrapper.module if isinstance(wrapper, AveragedModel) else model
    assert is_reduced(wrapper) and strategies(wrapper) == strategies(model)
    with guidance(wrapper, torch.randn(2, WIDTH)), record_stages(wrapper) as infos:
        inner(images())
    assert len(infos) == len(strategies(model)[0].stages(elip_models.towers.as_tower(model).size))
    assert not is_reduced(unreduce_(wrapper)) and is_reduced(inner.teacher)


def test_wrapper_of_two_models_names_both():
    both = nn.ModuleDict({"student": plain_vit(), "teacher": reduce_(plain_vit(), "tome")})
    calls = [
        is_reduced,
        unreduce_,
        reduction_summary,
        lambda model: reduce_(model, "tome"),
        lambda model: record_stages(model).__enter__(),
        lambda model: guidance(model, torch.randn(2, WIDTH)).__enter__(),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"2 of them; pass model.student or model.teacher$"):
            call(both)
    assert is_reduced(both.teacher)
    assert not is_reduced(nn.ModuleList([plain_vit(), plain_vit()]))
