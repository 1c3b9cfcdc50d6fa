"""A checkpoint whose content is of another kind is refused, even if its manifest fits."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from elip_models.pretraining.training.run_checkpoints import (
    STATE_FILE,
    Checkpoints,
    _digest,
    damage_of,
)
from elip_models.pretraining.training.train_batches import _read_positions
from elip_models.pretraining.training.trainer import train
from elip_models.validation import TrainingError
from tests.helpers.tiny_run import own_process, tiny_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of one step."""
    folder = tmp_path_factory.mktemp("run")
    with own_process():
        train(tiny_config(folder, "optim.steps=1"))
    return folder


def change_tensors(change):
    def damage(checkpoint):
        path = checkpoint / "model.safetensors"
        tensors = load_file(path)
        name = next(each for each in tensors if tensors[each].ndim == 2)
        tensors[name] = change(tensors[name])
        save_file(tensors, path)

    return damage


def change_saved(name, change):
    def damage(checkpoint):
        state = torch.load(checkpoint / name, weights_only=False)
        torch.save(change(state) or state, checkpoint / name)

    return damage


def first_state(values):
    return lambda state: state["state"][0].update(values)


def options(values):
    return lambda state: state["param_groups"][0].update(values)


DAMAGES = {
    "NaN": change_tensors(lambda tensor: tensor * torch.nan),
    "of torch.int8": change_tensors(lambda tensor: tensor.to(torch.int8)),
    "size mismatch": change_tensors(lambda tensor: tensor[:1].clone()),
    "beta": change_saved("optimizer.bin", options({"betas": "beta"})),
    "weight_decay": change_saved("optimizer.bin", options({"weight_decay": 9.0})),
    "exp_avg of": change_saved("optimizer.bin", first_state({"exp_avg": torch.zeros(3)})),
    "exp_avg_sq of": change_saved("optimizer.bin", first_state({"exp_avg_sq": [1]})),
    "KeyError": change_saved("optimizer.bin", lambda state: {"state": 1}),
    "unequal names or kinds": change_saved("optimizer.bin", first_state({"extra": 1.0})),
    "random states": change_saved("random_states_0.pkl", lambda state: {"step": 0}),
    "Error": lambda checkpoint: (checkpoint / "optimizer.bin").write_bytes(b"\x80\x04N."),
}


def sign(checkpoint, **changes):
    """Write a manifest that fits the files."""
    path = checkpoint / STATE_FILE
    path.unlink(missing_ok=True)
    invariants = {"num_processes": 1, "num_samples": 48}
    found = Checkpoints(checkpoint.parent)
    checkpoint.rename(found.unfinished(1))
    found.commit(1, keep=1, **invariants)
    if changes:
        state = json.loads(path.read_text()) | changes
        del state["sha256"]
        path.write_text(json.dumps(state | {"sha256": _digest(state)}))


@pytest.mark.parametrize("problem", DAMAGES)
def test_content_of_another_kind_is_refused(finished, tmp_path, problem):
    folder = shutil.copytree(finished, tmp_path / "run")
    checkpoint = Checkpoints(folder / "checkpoints").latest()
    DAMAGES[problem](checkpoint)
    sign(checkpoint)
    config = tiny_config(folder, "optim.steps=1")
    with (
        own_process(),
        pytest.raises(TrainingError, match=rf"step_00000001 cannot be resumed: .*{problem}"),
    ):
        train(config, resume=True)


MANIFESTS = {
    "step True": {"step": True},
    "step 2": {"step": 2},
    "step '1'": {"step": "1"},
    "no invariants": {"invariants": {"num_processes": 1.0}},
    "no size": {"files": {"model.safetensors": {"bytes": "1", "sha256": "0"}}},
    "not listed": {"files": {}},
    "../run.json is missing": {"files": {"../run.json": {"bytes": 1, "sha256": "0"}}},
    "wrong keys": {"more": 1},
}


@pytest.mark.parametrize("problem", MANIFESTS)
def test_a_manifest_of_another_kind_is_damage(tmp_path, problem):
    found = Checkpoints(tmp_path)
    found.unfinished(1).mkdir()
    (found.unfinished(1) / "model.safetensors").write_bytes(b"w")
    found.commit(1, keep=1)
    assert damage_of(found.latest()) is None
    sign(tmp_path / "step_00000001", **MANIFESTS[problem])
    assert problem in damage_of(tmp_path / "step_00000001")


@pytest.mark.parametrize("content", ["[1, 2]", "[[1, 2], [3, 4]]", '{"0": 1}', "\0"])
def test_the_place_in_a_stream_has_one_position_for_each_worker(tmp_path, content):
    path = tmp_path / "stream_0.json"
    path.write_text(content)
    with pytest.raises(TrainingError, match=r"stream_0\.json: expected the position .* 1 workers"):
        _read_positions(path, 1)
    path.write_text("[[3, 1]]")
    assert _read_positions(path, 1) == [(3, 1)]
