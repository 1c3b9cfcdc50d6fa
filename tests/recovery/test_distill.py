"""`distill` brings a reduced model nearer to the dense one, and a stopped run ends the same."""

import copy
import itertools
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from PIL import Image

import elip_models
from elip_models.analysis.feature_measures import cosine
from elip_models.recovery.distill import _outputs, _Run, distill
from elip_models.saving.files import read_state, write_tensors
from elip_models.validation import TrainingError
from tests.helpers.models import dinov2, eva, open_clip_vit, siglip_vision
from tests.helpers.tiers import slow_except
from tests.helpers.tiny_run import elip
from tests.helpers.towers import plain_vit


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return plain_vit().eval()


@pytest.fixture(scope="module")
def pictures():
    torch.manual_seed(1)
    return torch.nn.functional.interpolate(torch.randn(72, 3, 6, 6), (48, 48), mode="bicubic")


def reduced_copy(dense, **options):
    return elip_models.reduce_(copy.deepcopy(dense), **({"keep": 0.5} | options))


def weights_of(model):
    return {name: each.clone() for name, each in model.state_dict().items()}


def assert_same_weights(one, other):
    torch.testing.assert_close(dict(one), dict(other), rtol=0, atol=0)


@torch.no_grad()
def distances(dense, model, pictures):
    (feature, patches), (got, unmerged) = (_outputs(each, pictures) for each in (dense, model))
    return (
        1 - cosine(feature, got).mean(),
        1 - torch.cosine_similarity(patches, unmerged, dim=2).mean(),
    )


HELD_OUT = [{"lr": 3e-4}, {"lr": 1e-3, "lora_rank": 4}]


@pytest.mark.parametrize("options", slow_except([], HELD_OUT))
def test_held_out_features_come_nearer(dense, pictures, options):
    model, losses = reduced_copy(dense, strategy="tome"), []
    before = distances(dense, model, pictures[64:])
    found = distill(
        model,
        pictures[:64],
        steps=60,
        progress=lambda step, loss: losses.append(loss),
        **options,
    )
    after = distances(dense, model, pictures[64:])
    assert found is model and len(losses) == 60
    assert sum(losses[-8:]) < sum(losses[:8])
    assert after[0] < 0.7 * before[0] and after[1] < before[1], (before, after)
    assert list(model.state_dict()) == list(dense.state_dict())
    assert all(each.requires_grad for each in model.parameters())


def test_a_dense_model_is_reduced_and_a_reduced_one_keeps_its_strategy(dense, pictures):
    model = distill(copy.deepcopy(dense), pictures, keep=0.6, strategy="evit", steps=1)
    strategy = elip_models.reduction_summary(model).strategy
    assert strategy.name == "evit"
    distill(model, pictures, steps=1)
    assert elip_models.reduction_summary(model).strategy == strategy


@pytest.mark.parametrize("strategy", ["resize", "resize_merge"])
def test_a_smaller_image_learns_the_feature_alone(dense, pictures, strategy):
    """Its grid has other patches than the dense model's."""
    losses = []
    model = reduced_copy(dense, strategy=strategy)
    distill(model, pictures, steps=2, progress=lambda step, loss: losses.append(loss))
    feature, patches = _outputs(model, pictures[:2])
    assert patches is None and feature.shape[0] == 2
    assert len(losses) == 2


def test_lora_changes_the_linear_layers_of_blocks_alone(dense, pictures):
    model = distill(reduced_copy(dense), pictures, steps=3, lr=1e-2, lora_rank=2)
    before = dense.state_dict()
    changed = {n for n, each in model.state_dict().items() if not torch.equal(each, before[n])}
    linear = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert changed == {f"blocks.{i}.{name}.weight" for i in range(6) for name in linear}
    moved = model.blocks[0].mlp.fc1.weight - before["blocks.0.mlp.fc1.weight"]
    assert torch.linalg.matrix_rank(moved, rtol=1e-3) <= 2


@pytest.mark.parametrize("rank", slow_except([None], [None, 2]))
@pytest.mark.parametrize("make", [dinov2, eva, open_clip_vit, siglip_vision])
def test_towers_of_each_library_train_with_their_patches(make, rank, pictures):
    model, losses = make(), []
    before = weights_of(model)
    options = {"keep": 0.5, "steps": 2, "lr": 1e-3, "lora_rank": rank}
    distill(model, pictures, progress=lambda step, loss: losses.append(loss), **options)
    assert model.state_dict().keys() == before.keys() and len(losses) == 2
    assert not all(torch.equal(each, before[n]) for n, each in model.state_dict().items())
    assert _outputs(model, pictures[:2])[1].shape == (2, 36, 32)


STOPPED = [{}, {"lora_rank": 2}, {"strategy": "random"}]


@pytest.mark.parametrize("options", slow_except(STOPPED[2:], STOPPED))
def test_a_stopped_run_ends_as_an_uninterrupted_one(
    dense, pictures, tmp_path, monkeypatch, options
):
    monkeypatch.setattr("elip_models.recovery.distill.SAVE_EVERY", 2)
    file = tmp_path / "state.pt"
    options = {"keep": 0.5, "steps": 6, "lr": 1e-2, "seed": 3, **options}
    whole = distill(copy.deepcopy(dense), pictures, **options).state_dict()

    def stop(step, loss):
        if step == 5:
            raise KeyboardInterrupt

    options |= {"checkpoint": file}
    with pytest.raises(KeyboardInterrupt):
        distill(copy.deepcopy(dense), pictures, progress=stop, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    steps = []
    model = distill(
        copy.deepcopy(dense), pictures, progress=lambda step, loss: steps.append(step), **options
    )
    assert steps == [5, 6]
    assert_same_weights(model.state_dict(), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 5}, "checkpoint: expected a run with the same steps, got another one in"),
        ({"images": torch.ones(12, 3, 48, 48)}, "with the same images"),
        ({"model": plain_vit()}, "with the same model"),
    ],
)
def test_the_state_of_another_run_is_refused(
    dense, pictures, tmp_path, monkeypatch, change, message
):
    monkeypatch.setattr("elip_models.recovery.distill.SAVE_EVERY", 4)
    file = tmp_path / "state.pt"
    options = {"keep": 0.5, "steps": 4, "checkpoint": file, "images": pictures}
    distill(copy.deepcopy(dense), **options)
    with pytest.raises(ValueError, match=message):
        distill(**{"model": copy.deepcopy(dense), **options, **change})


def flip(state, tensors, file):
    content = bytearray(file.read_bytes())
    content[-50] ^= 1
    file.write_bytes(content)


def rewritten(change):
    def write(state, tensors, file):
        change(state, tensors)
        write_tensors(file, tensors, state)

    return write


NORM = "blocks.0.norm1.weight"
DAMAGES = {
    "cut": (lambda state, tensors, file: file.write_bytes(b"{}"), "expected a file .* damaged"),
    "flipped byte": (flip, "expected a file .* another SHA-256"),
    "another format": (
        rewritten(lambda state, tensors: state.pop("settings")),
        "expected a file .* settings",
    ),
    "negative steps": (rewritten(lambda state, tensors: state.update(done=-5)), "done: expected"),
    "many steps": (rewritten(lambda state, tensors: state.update(done=10**9)), "done: expected"),
    "no steps": (rewritten(lambda state, tensors: state.pop("done")), "done: expected"),
    "a shape that broadcasts": (
        rewritten(lambda state, tensors: tensors.update({f"trained.{NORM}": torch.ones(1)})),
        "expected the tensors of this model",
    ),
    "a moment that broadcasts": (
        rewritten(lambda state, tensors: tensors.update({f"exp_avg.{NORM}": torch.ones(1)})),
        "expected the tensors of this model",
    ),
    "a missing weight": (
        rewritten(lambda state, tensors: tensors.pop(f"trained.{NORM}")),
        "expected the tensors of this model",
    ),
}


@pytest.fixture(scope="module")
def state_file(dense, pictures, tmp_path_factory):
    """Return the state after both steps of a run, and the arguments of the run."""
    file = tmp_path_factory.mktemp("state") / "state.safetensors"
    options = {"keep": 0.5, "steps": 2, "images": pictures[:8]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("elip_models.recovery.distill.SAVE_EVERY", 2)
        distill(copy.deepcopy(dense), checkpoint=file, **options)
    return file, options


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_forged_state_is_refused(name, dense, state_file, tmp_path):
    (file, options), (damage, message) = state_file, DAMAGES[name]
    file = Path(shutil.copy(file, tmp_path))
    damage(*read_state(file), file)
    with pytest.raises((TypeError, ValueError), match=rf"^checkpoint: .*{message}"):
        distill(copy.deepcopy(dense), checkpoint=file, **options)


def folder_of(path, count):
    path.mkdir()
    for i in range(count):
        noise = torch.randint(256, (70, 90, 3), dtype=torch.uint8).numpy()
        Image.fromarray(noise).save(path / f"{i}.png")
    return path


def test_the_command(tmp_path, capsys):
    photographs = folder_of(tmp_path / "photographs", 12)
    (photographs / "a.jpg").write_bytes(b"no image")
    arguments = ["timm:test_vit", photographs, "--no-pretrained", "--keep", 0.6, "--steps", 2]
    torch.manual_seed(0)
    assert elip("distill", *arguments, "--batch-size", 4, "--output", tmp_path / "out") == 0
    shown = capsys.readouterr()
    assert "1 of 13 images were not read" in shown.err
    assert "dense features of 8 held-out images: " in shown.out and "after 2 steps" in shown.out
    assert shown.out.count("95% CI") == 2
    assert ".distill.safetensors" not in {path.name for path in (tmp_path / "out").iterdir()}
    model = elip_models.load_reduced(tmp_path / "out")
    assert elip_models.reduction_summary(model).keep == pytest.approx(0.6, abs=0.05)


@pytest.mark.slow
def test_a_stopped_command_continues(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("elip_models.recovery.distill.SAVE_EVERY", 1)
    step = _Run._step

    def stopped(run, i):
        if i == 1:
            raise TrainingError("stopped")
        return step(run, i)

    folder, output = folder_of(tmp_path / "photographs", 12), tmp_path / "out"

    def run(*options):
        torch.manual_seed(0)  # of the model's weights
        arguments = ["timm:test_vit", folder, "--no-pretrained", "--output", output, *options]
        return elip("distill", *arguments, "--steps", 3)

    monkeypatch.setattr(_Run, "_step", stopped)
    assert run() == 2
    assert {path.name for path in output.iterdir()} == {".distill.safetensors", ".lock"}
    monkeypatch.setattr(_Run, "_step", step)
    assert run("--lr", 1) == 2
    assert "--output: expected a run with the same lr" in capsys.readouterr().err
    with FileLock(output / ".lock"):
        assert run() == 2
    assert "--output: expected a folder that no other run uses" in capsys.readouterr().err
    assert run() == 0
    shown = capsys.readouterr()
    assert "continuing from " in shown.err and "after 3 steps" in shown.out
    assert elip_models.reduction_summary(elip_models.load_reduced(output)).keep < 0.6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "IMAGES: expected a folder of images"),
        (["photographs", "--keep", "2"], "--keep: expected"),
        (["photographs", "--output", "a/b"], "--output: expected a folder, or a new one in"),
        (["photographs", "--output", "photographs"], "--output: expected a new or empty folder"),
    ],
)
def test_wrong_arguments_of_the_command(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "photographs", 9)
    fixed = ["timm:test_vit", "--no-pretrained", "--output", "out"]
    assert elip("distill", *fixed, *arguments) == 2
    assert message in capsys.readouterr().err


def spoil_gradient(model, step):
    """Make the gradient of one weight NaN in this step, counted from 1; the loss stays finite."""
    gradients = itertools.count(1)
    weight = model.blocks[0].norm1.weight
    weight.register_hook(lambda g: g * torch.nan if next(gradients) == step else g)


def test_a_gradient_that_is_not_finite_is_an_error_and_changes_no_weight(dense, pictures, tmp_path):
    model, options = copy.deepcopy(dense), {"keep": 0.5, "lr": 1e-3}
    spoil_gradient(model, 3)
    with pytest.raises(TrainingError, match="the gradient norm of step 3 is nan; use a lower lr"):
        distill(model, pictures, steps=3, checkpoint=tmp_path / "state", **options)
    assert all(weight.isfinite().all() for weight in model.state_dict().values())
    _, tensors = read_state(tmp_path / "state")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
