"""Outputs are computed once, also by a run that was stopped."""

import pytest
import torch

from elip_models.calibration import outputs as module
from elip_models.calibration.features import Cosine
from elip_models.calibration.outputs import OUTPUTS, StoredOutputs


class Counted(Cosine):
    """Counts the images that run, and stops at one of them."""

    ran, stop_at = 0, None

    def __init__(self, count=12):
        super().__init__(
            torch.arange(count * 12.0).view(count, 3, 2, 2), features=None, batch_size=3
        )

    def forward(self, model, pixels):
        self.ran += len(pixels)
        if self.stop_at is not None and self.ran > self.stop_at:
            raise KeyboardInterrupt
        return pixels.flatten(1)


def stored(task, folder, origin=None):
    return StoredOutputs(task, folder, origin or {}, progress=lambda text: None)


@pytest.fixture
def model():
    return torch.nn.Linear(1, 1)


def test_images_run_once_in_any_order(model, tmp_path):
    for folder in (None, tmp_path / "out"):
        task = Counted()
        of = stored(task, folder).of
        few = of({"a": 1}, lambda: model, [1, 4, 7], name="a")["features"]
        more = of({"a": 1}, lambda: model, [0, 1, 2, 4], name="a")["features"]
        assert task.ran == 5
        assert few[:, 0].tolist() == [12, 48, 84] and more[:, 0].tolist() == [0, 12, 24, 48]
        of({"a": 2}, lambda: model, [1], name="b")
        assert task.ran == 6


def test_a_stopped_run_goes_on(model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PORTION", 3)
    monkeypatch.setattr(module, "SAVE_SECONDS", -1)
    task = Counted()
    task.stop_at = 7
    with pytest.raises(KeyboardInterrupt):
        stored(task, tmp_path).of(None, lambda: model, range(12), name="dense")
    again = Counted()
    outputs = stored(again, tmp_path).of(None, lambda: model, range(12), name="dense")
    assert again.ran == 6
    assert outputs["features"][:, 0].tolist() == [12.0 * i for i in range(12)]
    other = Counted()
    stored(other, tmp_path, {"model": "other"}).of(None, lambda: model, range(12), name="dense")
    assert other.ran == 12


def test_a_damaged_file_is_named(model, tmp_path):
    stored(Counted(), tmp_path).of(None, lambda: model, range(12), name="dense")
    (file,) = (tmp_path / OUTPUTS).iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=rf"folder: .*{file.name}.*; remove the file to run again"):
        stored(Counted(), tmp_path).of(None, lambda: model, range(12), name="dense")
