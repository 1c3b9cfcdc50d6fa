"""Latency, throughput and memory of one reduced model that eight threads share.

Each thread has its own text as guidance. A round is a hundred requests of one image, twelve per
thread, to the dense and to the reduced model; `--rounds 100` makes ten thousand of each.
"""

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psutil
import pytest
import timm
import torch

import elip_models
from benchmarks.cases import DEVICE, DTYPE_NAMES, MAIN_DTYPE
from benchmarks.parity import check_errors, relative_error
from elip_models.profiling.measure import milliseconds, ratios_to, time_side_by_side

TOWER, SIZE, THREADS = "vit_tiny_patch16_224", 96, 8
DENSE, STRATEGY = "dense", "elip:scorer=last"
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


class Server:
    """One model and the latencies of its answers."""

    def __init__(self, model, is_guided):
        self.model = model
        self.is_guided = is_guided
        self.latencies = []

    @torch.no_grad()
    def answer(self, image, text):
        if not self.is_guided:
            return self.model(image)
        with elip_models.guidance(self.model, text):
            return self.model(image)

    def request(self, image, text):
        start = time.perf_counter()
        answer = self.answer(image, text)
        if DEVICE.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self.latencies.append(time.perf_counter() - start)
        return answer

    def percentiles(self):
        """Return the percentiles of the latency of one answer, in milliseconds."""
        latencies = torch.tensor(self.latencies, dtype=torch.float64)
        return {name: 1e3 * latencies.quantile(q).item() for name, q in PERCENTILES.items()}


def served(pool, server, clients, requests):
    """Return the last answer to each client after `requests` concurrent requests."""

    def send(client):
        for _ in range(requests // len(clients)):
            answer = server.request(*client)
        return answer

    return list(pool.map(send, clients))


def largest_error(server, clients, answers):
    """Return the largest error of concurrent answers against sequential ones."""
    alone = (server.answer(*client).double() for client in clients)
    return max(map(relative_error, answers, alone))


def resident():
    """Return the resident memory of this process in bytes."""
    return psutil.Process().memory_info().rss


@pytest.fixture
def one_thread():
    """Limit torch to one thread per request."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_serving(record, rounds, scale):
    requests = THREADS if scale == "smallest" else 100
    random = {"device": DEVICE, "dtype": MAIN_DTYPE}
    model = timm.create_model(TOWER, img_size=SIZE, num_classes=0).to(**random).eval()
    reduced = elip_models.reduce_(copy.deepcopy(model), strategy=STRATEGY)
    clients = [
        (torch.randn(1, 3, SIZE, SIZE, **random), torch.randn(1, model.embed_dim, **random))
        for _ in range(THREADS)
    ]
    servers = {DENSE: Server(model, is_guided=False), "last": Server(reduced, is_guided=True)}
    with ThreadPoolExecutor(THREADS) as pool:
        steps = {n: partial(served, pool, each, clients, requests) for n, each in servers.items()}
        errors = {
            name: largest_error(servers[name], clients, step()) for name, step in steps.items()
        }
        checked = check_errors({"alone": 0.0} | errors, ours=list(errors))
        for server in servers.values():
            server.latencies.clear()
        before = resident()
        times = time_side_by_side(steps, device=torch.device("cpu"), rounds=rounds)
        record(
            steps["last"],
            op=TOWER,
            direction="inference",
            rounds=rounds,
            ratios={"last": ratios_to(DENSE, times)["last"]},
            milliseconds=milliseconds(times),
            latency={name: each.percentiles() for name, each in servers.items()},
            requests=len(servers["last"].latencies),
            grown_bytes=resident() - before,
            served_by={"threads": THREADS, "strategy": STRATEGY},
            shape={"B": 1, "image": SIZE},
            dtype=DTYPE_NAMES[MAIN_DTYPE],
            parity=checked,
        )
