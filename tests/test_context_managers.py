"""Context managers whose setting others can see leave it as it was, whichever way they end."""

import contextvars
import logging
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import elip_kernels
import elip_models
from elip_kernels import _operator
from elip_models.call_context import Guide, Record, items
from elip_models.pretraining.training import accelerator
from elip_models.saving.meta_build import quiet_logs
from elip_models.user_warnings import IgnoredWarning, SlowScorerWarning, ignoring
from elip_models.vlm.budget import Budget
from elip_models.vlm.question import Mask
from tests.helpers.towers import SCHEDULE, plain_vit
from tests.vlm.models import build


@pytest.fixture(scope="module")
def tower():
    return elip_models.reduce_(plain_vit(), schedule=SCHEDULE, strategy="elip")


@pytest.fixture(scope="module")
def llava():
    model, inputs = build("llava")
    return elip_models.reduce_(model, "cdpruner", keep=8), inputs["input_ids"] > 0


def text_of(tower):
    return torch.ones(1, tower.embed_dim)


PROCESS_WIDE = {
    "use_pytorch_ops": (
        lambda models: elip_kernels.use_pytorch_ops(),
        lambda models: _operator._DECOMPOSED.is_on,
    ),
    "export_custom_ops": (
        lambda models: elip_kernels.export_custom_ops(),
        lambda models: _operator._EXPORTED.is_on,
    ),
    "quiet_logs": (lambda models: quiet_logs(), lambda models: logging.root.manager.disable),
    "logs of a run": (
        lambda models: accelerator._QUIET.on(),
        lambda models: accelerator.LOGGER.level,
    ),
}
OF_A_THREAD = {
    "guidance": (
        lambda models: elip_models.guidance(models.tower, text_of(models.tower)),
        lambda models: [guide.text_cls is None for guide in items(Guide)],
    ),
    "guidance by a question": (
        lambda models: elip_models.guidance(models.llava, question=models.question),
        lambda models: len(items(Mask)),
    ),
    "budget": (lambda models: elip_models.budget(models.llava, 4), lambda models: items(Budget)),
    "record_stages": (
        lambda models: elip_models.record_stages(models.tower),
        lambda models: len(items(Record)),
    ),
    "ignoring": (
        lambda models: ignoring(SlowScorerWarning),
        lambda models: (items(IgnoredWarning), warnings.filters.copy()),
    ),
}
CASES = PROCESS_WIDE | OF_A_THREAD


@pytest.fixture
def models(tower, llava):
    return SimpleNamespace(tower=tower, llava=llava[0], question=llava[1])


def held(make, models):
    """A generator that is inside the block between its two ends."""
    with make(models):
        yield


@pytest.mark.parametrize("name", CASES)
def test_nested_blocks_and_errors_restore_the_setting(name, models):
    make, state = CASES[name]
    before = state(models)
    with make(models):
        inside = state(models)
        assert inside != before
        with pytest.raises(KeyError), make(models):
            raise KeyError
        assert state(models) == inside
    assert state(models) == before


@pytest.mark.parametrize("name", CASES)
def test_blocks_of_two_threads_that_overlap_restore_the_setting(name, models):
    make, state = CASES[name]
    before, steps = state(models), [threading.Event() for _ in range(3)]

    def first():
        with make(models):
            steps[0].set()
            steps[1].wait(60)
        steps[2].set()
        return state(models)

    def second():
        steps[0].wait(60)
        with make(models):
            steps[1].set()
            steps[2].wait(60)
            assert state(models) != before  # the block of the first thread has ended
        return state(models)

    with ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(thread) for thread in (first, second)]
        assert ends[1].result(60) == before
        ends[0].result(60)
    assert state(models) == before


@pytest.mark.parametrize("where", ["another context", "another thread"])
@pytest.mark.parametrize("name", CASES)
def test_a_generator_that_is_closed_elsewhere_restores_the_setting(name, where, models):
    make, state = CASES[name]
    before, generator = state(models), held(make, models)
    next(generator)
    assert state(models) != before
    if where == "another context":
        contextvars.copy_context().run(generator.close)
    else:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(generator.close).result(60)
    assert state(models) == before
    with make(models):
        assert state(models) != before
    assert state(models) == before
