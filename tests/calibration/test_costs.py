"""Costs are relative to the dense model on the same batch, whatever runs it."""

import pytest
import torch

from elip_models.calibration import costs as module
from elip_models.calibration.costs import Cost, measured_costs
from elip_models.calibration.features import Cosine


class Layers(torch.nn.Module):
    """A model whose time is that of its number of products."""

    def __init__(self, count):
        super().__init__()
        self.count, self.weight = count, torch.nn.Parameter(torch.eye(300))

    def forward(self, pixels):
        for _ in range(self.count):
            self.weight @ self.weight
        return pixels.flatten(1)


@torch.no_grad()
@pytest.mark.parametrize("compile", [False, True])
def test_times_are_shares_of_the_dense_time_by_batch_size(compile, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda step, **_: compiled.append(step) or step)
    monkeypatch.setattr(module, "COMPILED", 1)
    task = Cosine(torch.zeros(8, 3, 2, 2), features=lambda model, pixels: model(pixels))
    models = {"half": Layers(10), "tenth": Layers(2)}
    costs = measured_costs(task, Layers(20), models, range(8), batch_sizes=(1, 4), compile=compile)
    for name, share in {"half": 0.5, "tenth": 0.1}.items():
        assert costs[name].time.keys() == {"1", "4"} and costs[name].memory is None
        assert all(share / 3 < time < share * 1.8 for time in costs[name].time.values())
    assert len(compiled) == 8 * compile  # dense and a setting, twice for two batch sizes


def test_the_first_step_of_the_largest_batch_decides():
    cost = Cost({"1 prefill": 1, "1 decoding": 2, "16 prefill": 3, "16 decoding": 4}, None)
    assert cost.deciding == 3
