"""Programs of torch.export and traces of reduced models."""

import inspect
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

import elip_kernels
import elip_models
from tests.helpers.models import TOWERS, hf_clip, hf_vision, ids
from tests.helpers.tiers import first_quick
from tests.helpers.towers import SCHEDULE, clip_vit, images, plain_vit, text
from tests.strategies.test_strategies import STRATEGIES

BATCH, BATCHES = torch.export.Dim("batch"), (1, 2, 5)


def assert_runs_any_batch(program, model, inputs, output=lambda out: out):
    """Export with the arguments `inputs(batch)`."""
    for batch in BATCHES:
        args = inputs(batch)
        found, expected = output(program(*args)), output(model(*args))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


LOADS = {
    "trace": "torch.jit.load(path)",
    "export": "torch.export.load(path).module()",
}
"""How a process loads an archive of PyTorch."""


def save_archive(kind, model, path):
    """Save a reduced model for any batch size."""
    if kind == "trace":
        return torch.jit.save(torch.jit.trace(model, images(3)), path)
    program = torch.export.export(model, (images(3),), dynamic_shapes=({0: BATCH},))
    return torch.export.save(program, path)


def seeded_outputs(model, inputs):
    outputs = []
    for x in inputs:
        torch.manual_seed(0)
        outputs.append(model(x))
    return outputs


def outputs_alone(kind, path, inputs, library="torch"):
    """Return the outputs of an archive in a process that imports `library`, but not ours."""
    hidden = {"elip_kernels", "elip_models", "timm"} - {library}
    code = f"""
import sys
sys.modules.update(dict.fromkeys({hidden}))  # their import raises ImportError
import torch, {library}
path, inputs, outputs = sys.argv[1:]
model = {LOADS[kind]}
{inspect.getsource(seeded_outputs)}
with torch.no_grad():
    torch.save(seeded_outputs(model, torch.load(inputs)), outputs)
"""
    files = [path.parent / name for name in ("inputs.pt", "outputs.pt")]
    torch.save(inputs, files[0])
    done = subprocess.run(
        [sys.executable, "-c", code, path, *files], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return torch.load(files[1])


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"),
    [("trace", "evit"), ("export", "tome")],
)
def test_an_archive_runs_any_batch_where_only_torch_is_imported(kind, name, tmp_path):
    model = elip_models.reduce_(clip_vit().eval(), strategy=STRATEGIES[name])
    inputs, path = [images(batch) for batch in BATCHES], tmp_path / "model.pt2"
    with elip_models.guidance(model, text(1)):
        save_archive(kind, model, path)
        expected = seeded_outputs(model, inputs)
    outputs = outputs_alone(kind, path, inputs)
    torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.slow
def test_an_archive_of_our_ops_runs_where_elip_kernels_is_imported(tmp_path):
    model = elip_models.reduce_(plain_vit().eval(), strategy="tome", keep=0.6)
    inputs, path = [images(batch) for batch in BATCHES], tmp_path / "model.pt2"
    with elip_kernels.export_custom_ops():
        save_archive("export", model, path)
    outputs = outputs_alone("export", path, inputs, library="elip_kernels")
    torch.testing.assert_close(outputs, seeded_outputs(model, inputs), atol=1e-5, rtol=1e-5)
    with pytest.raises(AssertionError, match="elip"):
        outputs_alone("export", path, inputs)


HF_TOWERS = [("HF ViT", "tome"), ("HF DeiT", "evit"), ("HF CLIP", "elip")]


@torch.no_grad()
@pytest.mark.parametrize(("name", "strategy"), first_quick(HF_TOWERS))
def test_a_model_of_transformers_is_exported_without_its_own_mask(name, strategy):
    model, x = TOWERS[name]().eval(), images(3)
    elip_models.reduce_(model, strategy=strategy, keep=0.6)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: BATCH},)).module()
    assert_runs_any_batch(program, model, lambda batch: (images(batch),), lambda out: out[0])
    torch.testing.assert_close(model(x)[0], program(x)[0], atol=1e-6, rtol=1e-5)  # still eager


@pytest.mark.slow
def test_a_mask_of_the_caller_is_refused_in_an_exported_graph():
    model, x = hf_vision("ViTModel", "ViTConfig").eval(), images(2)
    elip_models.reduce_(model, strategy="elip", keep=0.6)
    mask = torch.ones(2, 37, dtype=torch.bool)
    with pytest.raises(Exception, match="attn_mask: expected none on a reduced model"):
        torch.export.export(model, (x,), {"attention_mask": mask})
    torch.export.export(model, (x,))
    mask[:, -1] = False
    with pytest.raises(ValueError, match="attn_mask: expected none on a reduced model"):
        model(x, attention_mask=mask)


@torch.no_grad()
@pytest.mark.slow
def test_a_whole_model_is_exported_with_its_own_guidance_for_any_batch():
    """The program has none of our ops, not even one that looks up the guidance."""
    model = elip_models.reduce_(hf_clip().eval(), strategy="guided_tome", keep=0.6)

    def inputs(batch):
        return ids(batch), images(batch)

    shapes = {key: {0: BATCH} for key in ("input_ids", "pixel_values")}
    with elip_models.guidance(model, paired=True):
        program = torch.export.export(model, inputs(3), dynamic_shapes=shapes)
        assert_runs_any_batch(program.module(), model, inputs, lambda out: out["image_embeds"])
    assert not [n.target for n in program.graph.nodes if str(n.target).startswith("elip")]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_a_trace_has_none_of_our_ops_unless_they_are_exported():
    model, x = elip_models.reduce_(plain_vit().eval(), schedule=SCHEDULE), images()

    def ops(trace):
        torch.testing.assert_close(trace(x), model(x), atol=1e-6, rtol=1e-5)
        return {node.kind() for node in trace.inlined_graph.nodes() if "elip" in node.kind()}

    assert ops(torch.jit.trace(model, x)) == set()
    with elip_kernels.export_custom_ops():
        trace = torch.jit.trace(model, x)
    assert ops(trace) == {"elip::score_reduce"}


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


@torch.no_grad()
@pytest.mark.slow
def test_a_program_for_any_size_merges_a_share_of_each_size():
    options = {"depth": 3, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **options).eval()
    elip_models.reduce_(model, "merge", keep=0.7)
    sizes = {2: 16 * torch.export.Dim("rows", min=4, max=40)}
    program = torch.export.export(model, (torch.rand(1, 3, 224, 224),), dynamic_shapes=(sizes,))
    for height in (96, 320):
        images = torch.rand(1, 3, height, 224)
        torch.testing.assert_close(program.module()(images), model(images))


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["resize", "resize_merge", "guided_tome"])
def test_a_strategy_that_needs_one_image_size_refuses_a_program_for_any(strategy):
    options = {"depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **options).eval()
    elip_models.reduce_(model, strategy, keep=0.7)
    sizes = {2: 16 * torch.export.Dim("rows", min=4, max=40)}
    with pytest.raises(ValueError, match=f"dynamic_shapes: expected one image .* '{strategy}'"):
        torch.export.export(model, (torch.rand(1, 3, 224, 224),), dynamic_shapes=(sizes,))
