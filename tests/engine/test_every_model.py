"""The guarantees of `reduce_` on every model: a tower alone, or a whole image-text model."""

import copy
import io
import pickle

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import elip_models
from elip_models.engine.install import reduction_of
from elip_models.towers import as_tower
from tests.helpers.models import (
    PAIRS,
    POOLED,
    POOLED_WITHOUT_CLS,
    ROTARY,
    TOWERS,
    UNGUIDED_PAIRS,
    WITHOUT_CLS,
    eva,
    hf_siglip,
    ids,
    naflex,
    open_clip_vit,
    output,
    output_of_pair,
    siglip_vision,
)
from tests.helpers.own_warnings import SLOW_SCORER, UNGUIDED
from tests.helpers.tiers import tiered
from tests.helpers.towers import SCHEDULE, WIDTH, gradients, images, plain_vit, text, whole_grid

LACK_CLS = WITHOUT_CLS | POOLED_WITHOUT_CLS
IMAGE_MODELS = TOWERS | ROTARY | POOLED | LACK_CLS
WHOLE = PAIRS | UNGUIDED_PAIRS
MODELS = IMAGE_MODELS | WHOLE
QUICK = ["timm", "timm registers", "open_clip", "HF CLIP", "HF ViT", "HF BLIP", "EVA-02 tiny"]
QUICK += ["HF DINOv2"]
QUICK += ["DINOv3", "rope mixed", "HF SigLIP vision", "timm SigLIP"]
QUICK += ["open_clip pair", "HF CLIP pair", "HF SigLIP pair"]
SLOW = ["timm distilled", "open_clip own attention", "timm attention, CLS", "HF DINOv2 average"]


def models_in(ways, argument, names=(*QUICK, *SLOW)):
    """Parametrise by models and options; quick: the first option, and one model per library."""
    ways = list(ways)
    quick = [(name, ways[0]) for name in QUICK]
    quick += [("timm", way) for way in ways[1:]]
    return pytest.mark.parametrize(
        ("name", argument), tiered([(name, way) for way in ways[::-1] for name in names], quick)
    )


class Call:
    """Return the output of a model for the same images, texts and random draws each time."""

    def __init__(self, name):
        self.is_pair = name in WHOLE
        self.images, self.text = images(), ids() if self.is_pair else text()

    def dense(self, model, x=None):
        """Of a model that is not reduced, or without the text that would guide a tower."""
        x = self.images if x is None else x
        torch.manual_seed(3)
        return output_of_pair(model, x, self.text) if self.is_pair else output(model, x)

    def __call__(self, model, x=None):
        """Of a reduced model: a tower is guided by the text, a whole model guides itself."""
        reduction = reduction_of(getattr(model, "_orig_mod", model))
        if self.is_pair and reduction.image_text is None:  # of CoCa
            return self.dense(model, x)
        with elip_models.guidance(model, None if self.is_pair else self.text, paired=self.is_pair):
            return self.dense(model, x)


def contents(model):
    """Return the attributes of all modules: dictionaries by keys, other values by identity."""
    return {
        name: {k: list(v) if isinstance(v, dict) else id(v) for k, v in vars(module).items()}
        for name, module in model.named_modules()
    }


@models_in(["eval", "train"], "mode", MODELS)
def test_an_empty_schedule_is_the_untouched_model(name, mode):
    model, call = getattr(MODELS[name](), mode)(), Call(name)
    expected, keys = call.dense(model), list(model.state_dict())
    assert elip_models.reduce_(model, schedule="6(100%)") is model
    assert torch.equal(call.dense(model), expected)
    assert list(model.state_dict()) == keys


SCORERS = ["official", "exact", "attention", "cls", "last", "received", 1]
SCORED = [(name, s) for name in TOWERS | ROTARY | POOLED for s in SCORERS]
SCORED += [(name, s) for name in LACK_CLS for s in ("exact", "last", 1)]
SCORED_QUICK = [
    (name, s) for name, s in SCORED if (name in QUICK and s == "exact") or name == "timm"
]
SCORED_SLOW = [("timm distilled", "official"), ("open_clip own attention", "last")]
SCORED_SLOW += [("EVA-02 tiny", "attention"), ("timm attention, CLS", "received")]
SCORED_SLOW += [("rope mixed", "cls"), ("HF DINOv2 average", 1)]


@SLOW_SCORER
@UNGUIDED
@pytest.mark.parametrize(("name", "scorer"), tiered(SCORED, SCORED_QUICK))
def test_a_reduced_model_equals_encode_image(name, scorer):
    model, call = MODELS[name]().eval(), Call(name)
    tower, plan = as_tower(model), {"schedule": SCHEDULE, "scorer": scorer}
    dense = call.dense(model)
    dense.sum().backward()
    trained, keys, before = gradients(model), list(model.state_dict()), contents(model)
    model.zero_grad()
    tokens, infos = elip_models.encode_image(
        model, call.images, call.text, return_info=True, **plan
    )
    assert tokens.shape == (2, 10 + 1 + tower.num_prefix_tokens, WIDTH)
    assert [info.stage.keep for info in infos] == [28, 18, 10]
    seen = []
    elip_models.reduce_(model, **plan)
    handle = tower.blocks[-1].register_forward_hook(
        lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    reduced = call(model)
    handle.remove()
    pooled = whole_grid(tokens, infos) if tower.pools else tokens
    assert torch.equal(tower.finish(seen[-1]), pooled)
    assert not torch.allclose(reduced, dense)
    assert list(model.state_dict()) == keys
    reduced.sum().backward()
    assert gradients(model).keys() == trained.keys()
    elip_models.unreduce_(model)
    assert torch.equal(call.dense(model), dense)
    assert contents(model) == before


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@SLOW_SCORER
@models_in(COPIES, "how")
def test_a_copy_has_its_own_reduction_and_can_be_undone(name, how):
    model, call = MODELS[name]().eval(), Call(name)
    dense = call.dense(model)
    elip_models.reduce_(model, schedule=SCHEDULE, scorer="exact")
    expected = call(model)
    other = COPIES[how](model)
    got = call(other)
    assert torch.equal(got, expected)
    got.sum().backward()
    assert gradients(other) and not gradients(model)
    assert torch.equal(call.dense(elip_models.unreduce_(other)), dense)
    assert torch.equal(call(model), expected)


def switched_on(model):
    """Enable the library's own checkpointing, which is not reentrant."""
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.set_grad_checkpointing(True)


@models_in(["of the library", "whole model"], "how")
def test_checkpointing_replays(name, how):
    if (name, how) == ("open_clip own attention", "of the library"):
        pytest.skip("open_clip 3.3 itself cannot checkpoint its CustomResidualAttentionBlock")
    model, call = MODELS[name]().train(), Call(name)
    elip_models.reduce_(model, schedule=SCHEDULE, scorer="exact")
    call(model).square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    if how == "of the library":
        switched_on(model)
        out = call(model)
    else:
        x = call.images.requires_grad_()
        out = checkpoint(lambda x: call(model, x), x, use_reentrant=False)
    out.square().sum().backward()
    got = gradients(model)
    assert got.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(got[key], gradient)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EVA-02 tiny", "HF CLIP pair"])
def test_compiles_whole_and_once(name):
    """This tests a reduction before a block; test_strategies.py tests the other kinds."""
    torch._dynamo.reset()
    model, call = MODELS[name]().eval(), Call(name)
    elip_models.reduce_(model, schedule="3(100%) 3(50%)", scorer="exact")
    expected = call(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = call(compiled)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        call(compiled, images())
    got.sum().backward()


def gated_eva():
    model = eva(attn_type="rope", rope_type="cat")
    model.blocks[2].attn.gate = nn.Linear(WIDTH, WIDTH)
    return model


timm_vit = timm.models.vision_transformer
MIXED = {"attn_type": "rope", "rope_type": "mixed"}
UNSUPPORTED = [
    ("patch dropout", lambda: plain_vit(patch_drop_rate=0.5)),
    ("parallel", lambda: plain_vit(block_fn=timm_vit.ParallelScalingBlock)),
    ("post-norm", lambda: plain_vit(block_fn=timm_vit.ResPostBlock)),
    ("RmsNorm", lambda: plain_vit(norm_layer=timm.layers.RmsNorm)),
    ("patch dropout", lambda: open_clip_vit(patch_dropout=0.5)),
    ("scaled cosine", lambda: open_clip_vit(scaled_cosine_attn=True)),
    ("output of each head", lambda: open_clip_vit(scale_heads=True)),
    ("change with the sizes of the images", lambda: naflex(rope_type="mixed")),
    ("patch dropout", lambda: naflex(patch_drop_rate=0.5)),
    ("patch dropout", lambda: eva(patch_drop_rate=0.5)),
    ("dynamic_img_size=False", lambda: eva(**MIXED, dynamic_img_size=True)),
    ("post-norm", lambda: eva(use_post_norm=True)),
    ("gates its attention", gated_eva),
    ("grouped-query", lambda: eva(attn_type="rope", qkv_fused=False, num_kv_heads=1)),
    ("draws each block", lambda: eva(**MIXED, rope_shift_coords=0.1)),
    ("its text is 24 wide, its image tower 32", lambda: hf_siglip(projection_size=24)),
]
NEEDS_CLS = {
    "no CLS token, whose attention selects": {"strategy": "evit"},
    "a text alone can score": {"schedule": SCHEDULE, "without_text": "vision"},
    "fusion below 1": {"schedule": SCHEDULE, "fusion": 1.0},
    "'official' takes a CLS token through": {"schedule": SCHEDULE, "scorer": "official"},
    "'cls' takes a CLS token through": {"schedule": SCHEDULE, "scorer": "cls"},
    "needs the norm of a CLS token": {"schedule": SCHEDULE, "guidance_norm": "match"},
}
REFUSED = [(reason, make, {"schedule": SCHEDULE}) for reason, make in UNSUPPORTED]
REFUSED += [(reason, siglip_vision, settings) for reason, settings in NEEDS_CLS.items()]


@pytest.mark.parametrize(("reason", "make", "settings"), REFUSED, ids=[r for r, *_ in REFUSED])
def test_an_unsupported_model_raises_the_reason(reason, make, settings):
    model = make()
    before = contents(model)
    with pytest.raises(TypeError, match=reason):
        elip_models.reduce_(model, **settings)
    assert contents(model) == before
