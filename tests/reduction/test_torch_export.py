"""torch.export of a reduced model, AOTInductor's package of it, and TorchScript."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

import elip_kernels
import elip_models
from tests.helpers.models import TOWERS, hf_clip, hf_vision, ids, open_clip_pair
from tests.helpers.tiers import slow_except, tiered
from tests.helpers.towers import SCHEDULE, clip_vit, images, plain_vit, text
from tests.reduction.test_strategies import STRATEGIES

BATCH = torch.export.Dim("batch")


def assert_runs_any_batch(program, model, inputs, output=lambda out: out):
    """Export with the arguments `inputs(batch)`."""
    for batch in (1, 2, 5):
        args = inputs(batch)
        found, expected = output(program(*args)), output(model(*args))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    slow_except([], ["resize"])
    + tiered([n for n in STRATEGIES if n != "resize"], [], slow=["elip"]),
)
def test_a_program_takes_any_batch_and_has_the_guidance(name):
    model = elip_models.reduce_(clip_vit().eval(), strategy=STRATEGIES[name])
    with elip_models.guidance(model, text(1)):
        program = torch.export.export(model, (images(3),), dynamic_shapes=({0: BATCH},)).module()
        if name == "random":  # it draws anew in every call
            assert program(images(5)).shape == model(images(5)).shape
        else:
            assert_runs_any_batch(program, model, lambda batch: (images(batch),))


HF_TOWERS = [("HF ViT", "tome"), ("HF DeiT", "evit"), ("HF DINOv2", "tome")]
HF_TOWERS += [(name, "elip") for name in ("HF ViT", "HF DeiT", "HF CLIP", "HF BLIP")]
HF_TOWERS += [("HF DINOv2 registers", "evit")]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "strategy"), tiered(HF_TOWERS, HF_TOWERS[:1], slow=[("HF DeiT", "evit")])
)
def test_a_model_of_transformers_is_exported_without_its_own_mask(name, strategy):
    model, x = TOWERS[name]().eval(), images(3)
    elip_models.reduce_(model, strategy=strategy, keep=0.6)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: BATCH},)).module()
    assert_runs_any_batch(program, model, lambda batch: (images(batch),), lambda out: out[0])
    torch.testing.assert_close(model(x)[0], program(x)[0], atol=1e-6, rtol=1e-5)  # still eager


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_a_mask_of_the_caller_is_refused_in_an_exported_graph(strict):
    model, x = hf_vision("ViTModel", "ViTConfig").eval(), images(2)
    elip_models.reduce_(model, strategy="elip", keep=0.6)
    mask = torch.ones(2, 37, dtype=torch.bool)
    with pytest.raises(Exception, match="attn_mask: expected none on a reduced model"):
        torch.export.export(model, (x,), {"attention_mask": mask}, strict=strict)
    torch.export.export(model, (x,), strict=strict)
    mask[:, -1] = False
    with pytest.raises(ValueError, match="attn_mask: expected none on a reduced model"):
        model(x, attention_mask=mask)


PAIRS = [(lib, name) for lib in ("open_clip", "HF") for name in ("elip", "guided_tome", "adaptive")]


@torch.no_grad()
@pytest.mark.parametrize(("library", "name"), tiered(PAIRS, [], slow=[("open_clip", "elip")]))
def test_a_whole_model_is_exported_with_its_own_guidance_for_any_batch(library, name):
    """The program has only our ops of the reduction, and none that looks up the guidance."""
    model = {"open_clip": open_clip_pair, "HF": hf_clip}[library]().eval()
    elip_models.reduce_(model, strategy=name, keep=0.6)

    def inputs(batch):
        return tuple(f(batch) for f in ((images, ids) if library == "open_clip" else (ids, images)))

    names = ("image", "text") if library == "open_clip" else ("input_ids", "pixel_values")
    shapes = {key: {0: BATCH} for key in names}
    program = torch.export.export(model, inputs(3), dynamic_shapes=shapes)
    of_images = "image_features" if library == "open_clip" else "image_embeds"
    assert_runs_any_batch(program.module(), model, inputs, lambda out: out[of_images])
    ours = {str(n.target) for n in program.graph.nodes if str(n.target).startswith("elip.")}
    assert not any("guidance" in each for each in ours)
    if name == "elip":
        assert ours == {"elip.score_reduce.default"}


DECOMPOSED = {
    "elip": {"schedule": SCHEDULE},
    "evit": {"strategy": "evit"},
    "tome": {"strategy": "tome"},
}


def decomposed_program(options):
    """Return a reduced model, exported inside `use_pytorch_ops`, and the model."""
    model = elip_models.reduce_(plain_vit().eval(), **options)
    with torch.no_grad(), elip_kernels.use_pytorch_ops():
        return torch.export.export(model, (images(),)), model


@pytest.mark.parametrize("name", tiered(DECOMPOSED, [], slow=["elip"]))
def test_a_decomposed_program_has_none_of_our_ops(name):
    program, model = decomposed_program(DECOMPOSED[name])
    assert not [n.target for n in program.graph.nodes if str(n.target).startswith("elip.")]
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), atol=1e-6, rtol=1e-5)


def test_outside_of_it_ops_are_ops_again():
    tokens, row = torch.randn(2, 9, 4), torch.rand(2, 9)

    def ops():
        with torch.profiler.profile() as profile:
            elip_kernels.reduce(tokens, row, 3)
        return [each.key for each in profile.key_averages() if each.key.startswith("elip::")]

    with pytest.raises(KeyError), elip_kernels.use_pytorch_ops():
        assert ops() == []
        raise KeyError
    assert ops() == ["elip::reduce"]


ALONE = """
import sys, torch
x, expected = torch.load(sys.argv[2])
found = torch._inductor.aoti_load_package(sys.argv[1])(x)
torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
assert not {"elip_kernels", "elip_models"} & sys.modules.keys()
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="AOTInductor needs a C++ compiler"
)
def test_aotinductor_runs_a_decomposed_program_where_our_ops_are_unknown(tmp_path):
    """One strategy suffices: it compiles for a minute, and all programs have ATen ops alone."""
    program, model = decomposed_program(DECOMPOSED["elip"])
    x, package, tensors = images(), tmp_path / "model.pt2", tmp_path / "tensors.pt"
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=str(package))
        torch.save((x, model(x)), tensors)
    words = [sys.executable, "-c", ALONE, str(package), str(tensors)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("wrap", [lambda model: model, nn.Sequential], ids=["itself", "inside"])
def test_scripting_raises_until_the_reduction_is_undone(wrap):
    model = elip_models.reduce_(plain_vit().eval(), schedule=SCHEDULE)
    with pytest.raises(
        ValueError, match=r"torch\.jit\.script .*use torch.export or torch.jit.trace"
    ):
        torch.jit.script(wrap(model))
    scripted = torch.jit.script(wrap(elip_models.unreduce_(model)))
    x = images()
    assert torch.equal(scripted(x), model(x))


TRACED = [name for name in STRATEGIES if name not in ("random", "resize")]


@torch.no_grad()
@pytest.mark.parametrize("name", tiered(TRACED, ["elip"], slow=["evit"]))
def test_a_trace_runs_any_batch(name):
    model = elip_models.reduce_(plain_vit().eval(), strategy=STRATEGIES[name])
    assert_runs_any_batch(torch.jit.trace(model, images(3)), model, lambda batch: (images(batch),))
