"""docs/timm_models.md agrees with the code, and its supported models can be reduced."""

from itertools import zip_longest
from pathlib import Path

import pytest
import timm
import torch

import elip_models
from elip_models.analysis.supported_models import FLAGS
from elip_models.towers import as_tower
from tests.helpers.scripts import load_script
from tests.helpers.tiers import tiered

DOCS = Path(__file__).parents[2] / "docs"
QUICK = {
    "vit_base_patch16_224": "vision_transformer",
    "vit_base_patch16_siglip_224": "vision_transformer",
    "vit_small_patch16_18x2_224": "vision_transformer",
    "vit_small_patch16_dinov3": "eva",
    "eva02_tiny_patch14_224": "eva",
    "beit_base_patch16_224": "beit",
    "cait_xxs24_224": "cait",
}


timm_models = load_script(DOCS / "timm_models.py")
PAGE = timm_models.PAGE.read_text(encoding="utf-8")
ANSWERS = timm_models.read(PAGE)
is_of_this_timm = pytest.mark.skipif(
    f"timm {timm.__version__}:" not in PAGE, reason="the page was written with another timm"
)


@is_of_this_timm
@pytest.mark.parametrize("name", tiered(QUICK, ["vit_small_patch16_dinov3"]))
def test_the_page_is_what_the_code_answers(name):
    assert timm_models.answer(name, QUICK[name])._replace(notes=()) == ANSWERS[name]


@is_of_this_timm
def test_the_page_has_every_name_once():
    assert {name: answer.module for name, answer in ANSWERS.items()} == dict(timm_models.names())


def sample(count):
    """Names of all kinds that are reduced, one of each in turn, the first of each line first."""
    lines, known = {}, set(timm.list_models())
    for name, answer in ANSWERS.items():
        if answer.heading.startswith(timm_models.WORKS) and name in known:
            lines.setdefault(answer, []).append(name)
    turns = zip_longest(*(found[:: max(1, len(found) // 8)] for found in lines.values()))
    return [name for turn in turns for name in turn if name is not None][:count]


SAMPLE = sample(6)
SMALL = {"depth": 4, "embed_dim": 128, "num_heads": 2}  # a head's width must fit rotations


def small(name):
    """The model of that name, four layers deep and narrow, on 8 x 8 patches where it can be."""
    flags = FLAGS.get(ANSWERS[name].heading.rpartition("with ")[2].strip("`"), {})
    if ANSWERS[name].module in ("vision_transformer_hybrid", "vitamin"):
        return timm.create_model(name, img_size=128, **flags)  # a backbone of its own sizes
    with torch.device("meta"):
        whole = timm.create_model(name, **flags)
    patch = (getattr(whole, "patch_embed", None) or whole.embeds).patch_size[0]
    return timm.create_model(name, img_size=8 * patch, **SMALL, **flags)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_what_the_page_calls_supported_runs_forward_and_backward(name):
    torch.manual_seed(0)
    model = small(name)
    tower = as_tower(model)
    is_naflex = ANSWERS[name].module == "naflexvit"  # it takes any size, by default a large one
    x = torch.randn(2, 3, *((128, 128) if is_naflex else tower.image_size))
    dense = model(x)
    dense.square().mean().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    unsupported = ANSWERS[name].kind
    for strategy in ("elip", "random", "evit", "tome"):
        if f"`{strategy}`" in unsupported:
            continue
        model.zero_grad()
        elip_models.reduce_(model, strategy=strategy)
        with elip_models.guidance(model, torch.randn(2, tower.width)):
            out = model(x)
        out.square().mean().backward()
        assert out.shape == dense.shape and out.isfinite().all(), strategy
        assert {n for n, p in model.named_parameters() if p.grad is not None} == trained, strategy
        elip_models.unreduce_(model)
