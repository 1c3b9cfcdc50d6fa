"""A use of every public function of the core, for a copy without the parts that stand on it.

tests/project/test_core_alone.py runs it as a script in the folder of such a copy.
"""

from pathlib import Path

import timm
import torch

import elip_models
from elip_models.cli import main

SCHEDULE = "2(100%) 2(50%)"


def reduce_record_and_save(model, images):
    dense = model(images)
    elip_models.reduce_(model, keep=0.5)
    assert elip_models.is_reduced(model)
    with elip_models.record_stages(model) as stages:
        reduced = model(images)
    assert stages and not torch.equal(reduced, dense)
    assert elip_models.reduction_summary(model).forward_flops < 0.7
    elip_models.save_reduced(model, "saved")
    assert torch.equal(elip_models.load_reduced("saved")(images), reduced)
    elip_models.unreduce_(model)
    assert torch.equal(model(images), dense)


def guide_and_encode(model, images):
    text_cls = torch.randn(len(images), model.embed_dim)
    elip_models.reduce_(model, strategy="elip", schedule=SCHEDULE, scorer="last")
    with elip_models.guidance(model, text_cls):
        guided = model(images)
    assert not torch.equal(guided, model(images))
    elip_models.unreduce_(model)
    tokens = elip_models.encode_image(model, images, text_cls, schedule=SCHEDULE)
    assert tokens.shape == (len(images), 8 + 2, model.embed_dim)


def calibrate_and_distill(model, images):
    results = elip_models.calibrate(model, images, strategies=("tome",), time=False)
    assert results.settings
    elip_models.distill(model, images, keep=0.5, steps=2, batch_size=4)
    assert elip_models.is_reduced(model)


def open_by_name():
    model = elip_models.open_model("timm:vit_tiny_patch16_224", pretrained=False, depth=1)
    assert not elip_models.is_reduced(model)
    try:
        elip_models.open_model("elip_clip_vit_b16")
    except ValueError as error:
        assert "spec: expected" in str(error)
    else:
        raise AssertionError("a model of the paper was opened")


def name_what_is_missing():
    parts = {"create_model": "pretraining", "list_models": "pretraining", "embed": "embedding"}
    for name, part in parts.items():
        try:
            getattr(elip_models, name)
        except ImportError as error:
            assert f"{name} needs elip_models.{part}, which this copy lacks" in str(error)
        else:
            raise AssertionError(f"{name} was imported")


def run_commands():
    for words, status in ((["--help"], 0), (["calibrate", "--help"], 0), (["recipes"], 2)):
        try:
            main(words)
        except SystemExit as exit_:
            assert (exit_.code or 0) == status, words


assert Path(elip_models.__file__).is_relative_to(Path.cwd()), elip_models.__file__
torch.manual_seed(0)
vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4).eval()
batch = torch.randn(8, 3, 64, 64)
with torch.no_grad():
    reduce_record_and_save(vit, batch)
    guide_and_encode(vit, batch)
calibrate_and_distill(vit, batch)
open_by_name()
name_what_is_missing()
run_commands()
