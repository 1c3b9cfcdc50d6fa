"""Errors of the public functions: every bad argument is named, with requirement and value."""

import inspect
import re

import numpy as np
import pytest
import timm
import torch

import elip_kernels
import elip_models
from elip_models.api import is_reduced
from elip_models.strategies.elip_options import ELIPOptions
from tests.helpers.argument_cases import TABLE
from tests.helpers.own_warnings import UNGUIDED
from tests.helpers.towers import SCHEDULE, plain_vit

ALIASES = {
    "text": "(schedule|text)",
    "pretrained": "(pretrained|folder)",
    "overrides": r"\w+",
    "total": "keep",
}


def entered(context):
    """A function that enters a context and leaves it."""

    def enter(**arguments):
        with context(**arguments):
            pass

    return enter


CONTEXT_MANAGERS = (
    elip_kernels.use_pytorch_ops,
    elip_kernels.export_custom_ops,
    elip_models.budget,
    elip_models.guidance,
    elip_models.record_stages,
)
CONTEXTS = {manager: entered(manager) for manager in CONTEXT_MANAGERS}


CASES = [
    pytest.param(function, good, argument, values, id=f"{function.__name__}-{argument}")
    for function, (good, table) in TABLE.items()
    for argument, values in table.items()
]


@UNGUIDED
@pytest.mark.parametrize(("function", "good", "argument", "values"), CASES)
def test_a_bad_argument_is_named_with_what_was_expected_and_got(function, good, argument, values):
    call = CONTEXTS.get(function, function)
    message = rf"^{ALIASES.get(argument, argument)}: expected .*got "
    for value in values:
        arguments = good()
        if function is elip_models.unreduce_:
            arguments.pop("schedule")
        arguments |= value if argument == "overrides" else {argument: value}
        try:
            call(**arguments)
        except (TypeError, ValueError, FileNotFoundError) as error:
            assert re.search(message, str(error), re.S), f"{value!r:.100}: {error}"
        else:
            pytest.fail(f"{argument}={value!r:.100} raised no error")


@pytest.mark.parametrize("function", TABLE, ids=lambda f: f.__name__)
def test_the_table_has_every_argument(function):
    arguments = set(inspect.signature(function).parameters)
    if function in (elip_models.encode_image, elip_models.reduce_):
        arguments |= set(ELIPOptions.__annotations__)
    assert set(TABLE[function][1]) == arguments - {"options"}


OPS = [op for op in TABLE if op.__name__ in elip_kernels.__all__ and op not in CONTEXTS]


@UNGUIDED
@pytest.mark.parametrize("function", OPS, ids=lambda f: f.__name__)
def test_a_number_of_numpy_is_a_number(function):
    arguments = TABLE[function][0]()
    of_numpy = {n: np.float32(v) for n, v in arguments.items() if type(v) is float}
    of_numpy |= {n: np.int64(v) for n, v in arguments.items() if n == "keep" and type(v) is int}
    found, expected = function(**arguments | of_numpy), function(**arguments)
    assert str(found) == str(expected)


@UNGUIDED
@pytest.mark.parametrize("function", TABLE, ids=lambda f: f.__name__)
def test_good_arguments_pass(function):
    arguments = TABLE[function][0]()
    if function is elip_models.unreduce_:
        arguments.pop("schedule")
    CONTEXTS.get(function, function)(**arguments)


def test_every_public_function_is_in_the_table():
    public = [getattr(elip_kernels, n) for n in elip_kernels.__all__]
    public += [getattr(elip_models, n) for n in elip_models.__all__]
    functions = {f for f in public if inspect.isfunction(f)}
    assert functions <= set(TABLE)


def test_a_refused_call_leaves_the_model_as_it_was():
    model = elip_models.reduce_(plain_vit(), schedule=SCHEDULE)
    forwards = [vars(m).get("forward") for m in model.modules()]
    assert any(forwards)
    with pytest.raises(ValueError, match="scorer"):
        elip_models.reduce_(model, schedule=SCHEDULE, scorer="none")
    assert [vars(m).get("forward") for m in model.modules()] == forwards
    fresh = timm.create_model("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="12 layers"):
        elip_models.reduce_(fresh, schedule=SCHEDULE)
    assert not is_reduced(fresh)


@pytest.mark.parametrize(
    ("name", "fields", "longest"),
    [
        ("albef_tiny", {}, 64),
        ("blip_tiny", {}, 64),
        ("meter_tiny", {}, 64),
        ("meter_tiny", {"text_encoder": "roberta", "pad_token_id": 1, "cls_token_id": 0}, 62),
    ],
)
def test_a_text_that_is_too_long_is_named(name, fields, longest):
    model = elip_models.create_model(name, **fields).eval()
    ids = torch.full((1, longest + 1), 5)
    model.encode_text(ids[:, :longest], torch.ones(1, longest))
    with pytest.raises(ValueError, match=rf"input_ids: .*at most {longest} .*got {longest + 1}"):
        model.encode_text(ids, torch.ones_like(ids))
