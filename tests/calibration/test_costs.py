"""Costs are relative to the dense model on the same batch, whatever runs it."""

import pytest
import torch

from elip_models.calibration import costs as module
from elip_models.calibration.costs import Cost, measured_costs
from elip_models.calibration.features import Cosine


class Counted(torch.nn.Module):
    """A model that adds its cost for each image to a list."""

    def __init__(self, cost, spent):
        super().__init__()
        self.cost, self.spent, self.weight = cost, spent, torch.nn.Parameter(torch.ones(1))

    def forward(self, pixels):
        self.spent.append(self.cost * len(pixels))
        return pixels.flatten(1)


@torch.no_grad()
@pytest.mark.parametrize("compile", [False, True])
def test_times_are_shares_of_the_dense_time_by_batch_size(compile, monkeypatch):
    compiled, spent = [], []

    def time(steps, **options):
        seconds = {}
        for name, step in steps.items():
            spent.clear()
            step()
            seconds[name] = [float(sum(spent))]
        return seconds

    monkeypatch.setattr(torch, "compile", lambda step, **_: compiled.append(step) or step)
    monkeypatch.setattr(module, "time_side_by_side", time)
    monkeypatch.setattr(module, "COMPILED", 1)
    task = Cosine(torch.zeros(8, 3, 2, 2), features=lambda model, pixels: model(pixels))
    models = {"half": Counted(10, spent), "tenth": Counted(2, spent)}
    dense = Counted(20, spent)
    costs = measured_costs(task, dense, models, range(8), batch_sizes=(1, 4), compile=compile)
    assert costs == {
        "half": Cost({"1": 0.5, "4": 0.5}, None),
        "tenth": Cost({"1": 0.1, "4": 0.1}, None),
    }
    assert len(compiled) == 8 * compile  # dense and a setting, twice for two batch sizes


def test_the_first_step_of_the_largest_batch_decides():
    cost = Cost({"1 prefill": 1, "1 decoding": 2, "16 prefill": 3, "16 decoding": 4}, None)
    assert cost.deciding == 3
