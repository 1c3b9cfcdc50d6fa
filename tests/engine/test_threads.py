"""Threads and tasks share one reduced model, each with its own guidance and forward."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import elip_models
from tests.helpers.tiers import slow_except
from tests.helpers.towers import SCHEDULE, clip_vit, images, plain_vit, text
from tests.strategies.test_strategies import STRATEGIES

THREADS = 8
QUICK = ("elip",)
strategies = pytest.mark.parametrize("name", slow_except(QUICK, ["elip", "evit", "tome"]))


def in_threads(run, count=THREADS):
    """Return the results of run(i), each in its own thread, all started together."""
    barrier = threading.Barrier(count)

    def begin(i):
        barrier.wait()
        return run(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def wrong_of(model, run, rounds):
    """Return how many outputs of `rounds` calls per thread differ from sequential calls."""
    expected = [run(model, i) for i in range(THREADS)]
    seed = torch.random.get_rng_state()

    def repeat(i):
        return sum(not torch.equal(run(model, i), expected[i]) for _ in range(rounds))

    wrong = sum(in_threads(repeat))
    assert torch.equal(torch.random.get_rng_state(), seed) or model.training
    return wrong


@torch.no_grad()
def guided(model, i):
    with elip_models.guidance(model, TEXTS[i]):
        return model(IMAGES[i])


torch.manual_seed(5)
IMAGES = [images(2) for _ in range(THREADS)]
TEXTS = [4 * text(2) for _ in range(THREADS)]


@strategies
def test_every_strategy_serves_threads(name):
    strategy = STRATEGIES[name]
    model = clip_vit().eval()
    elip_models.reduce_(model, strategy=strategy)
    if strategy.name == "random":  # what it draws is drawn from one state for all threads
        with torch.no_grad():
            assert in_threads(lambda i: model(IMAGES[i]).shape) == [model(IMAGES[0]).shape] * 8
        return
    assert wrong_of(model, guided, 6) == 0


def test_tasks_of_one_thread_have_their_own_guidance():
    model = clip_vit().eval()
    elip_models.reduce_(model, schedule=SCHEDULE, fusion=0.2)
    expected = [guided(model, i) for i in range(THREADS)]

    async def task(i):
        outputs = []
        for _ in range(4):
            with elip_models.guidance(model, TEXTS[i]):
                await asyncio.sleep(0)
                with torch.no_grad():
                    outputs.append(model(IMAGES[i]))
                await asyncio.sleep(0)
                # A thread that the task waits for is guided as the task is.
                outputs.append(await asyncio.to_thread(torch.no_grad()(model), IMAGES[i]))
        return outputs

    async def all_tasks():
        return await asyncio.gather(*map(task, range(THREADS)))

    for outputs, right in zip(asyncio.run(all_tasks()), expected, strict=True):
        assert all(torch.equal(output, right) for output in outputs)


def compiled_model(**options):
    torch._dynamo.reset()
    model = plain_vit().eval()
    elip_models.reduce_(model, schedule=SCHEDULE, **options)
    return model, torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.slow
def test_a_compiled_model_never_uses_the_guidance_of_another_thread():
    model, compiled = compiled_model(fusion=0.2)
    with torch.no_grad():
        unguided = compiled(IMAGES[0])
    expected = [guided(model, i) for i in range(2)]
    with torch.no_grad(), elip_models.guidance(model, TEXTS[0]):
        assert torch.allclose(compiled(IMAGES[0]), expected[0], atol=1e-6)

        def elsewhere(i):
            with torch.no_grad(), pytest.raises(RuntimeError, match="one thread or task at a time"):
                compiled(IMAGES[0])  # unguided here
            with torch.no_grad(), elip_models.guidance(model, TEXTS[1]):
                inside = compiled(IMAGES[1])
                ready.set()
                assert done.wait(60)
            return inside

        ready, done = threading.Event(), threading.Event()
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(elsewhere, 1)
            assert ready.wait(60)
            with pytest.raises(RuntimeError, match="one thread or task at a time"):
                compiled(IMAGES[0])  # guided there meanwhile
            done.set()
            assert torch.allclose(other.result(), expected[1], atol=1e-6)
        assert torch.allclose(compiled(IMAGES[0]), expected[0], atol=1e-6)
    with torch.no_grad():
        assert torch.equal(compiled(IMAGES[0]), unguided)


def test_data_parallel_raises():
    model = plain_vit()
    elip_models.reduce_(model, schedule=SCHEDULE)
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        [module._replicate_for_data_parallel() for module in model.modules()]
    elip_models.unreduce_(model)
    for module in model.modules():
        module._replicate_for_data_parallel()  # raises no more
