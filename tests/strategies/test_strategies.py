"""All strategies: against the official tensors, in a model, and at equal FLOPs."""

from dataclasses import replace
from itertools import chain

import pytest
import torch

import elip_models
from elip_models import (
    ELIP,
    TRIPS,
    EViT,
    GuidedToMe,
    ImageResize,
    PatchDropout,
    RandomPruning,
    TokenMerging,
    ToMe,
)
from elip_models.towers import as_tower
from tests.helpers.models import (
    TOWERS,
    eva,
    ids,
    open_clip_pair,
    output,
    siglip_vision,
)
from tests.helpers.official import check_gradients, tower
from tests.helpers.own_warnings import UNGUIDED
from tests.helpers.strategies import with_every_strategy
from tests.helpers.tiers import slow_except
from tests.helpers.towers import (
    SCHEDULE,
    WIDTH,
    assert_equal_gradients,
    gradients,
    images,
    plain_vit,
    text,
    whole_grid,
)


def loaded(golden, name):
    """Return a golden case and its tower with the official weights."""
    case = golden(name)
    model = tower(case)
    weights = {n: w for n, w in case.under("sd/").items() if not n.startswith("head.")}
    model.load_state_dict(weights)
    return case, model.eval()


def run(case, model, strategy, prefix=""):
    """Return tokens and logits of the case's image, and gradients of its loss."""
    head = {n: case[f"sd/head.{n}"].clone().requires_grad_() for n in ("weight", "bias")}
    image = case["image"].clone().requires_grad_()
    tokens, infos = elip_models.encode_image(model, image, strategy=strategy, return_info=True)
    logits = tokens[:, 0] @ head["weight"].T + head["bias"]
    loss = (logits * case[f"{prefix}upstream/logits"]).sum()
    loss = loss + (tokens * case[f"{prefix}upstream/out_tokens"]).sum()
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    grads |= {f"head.{n}": p.grad for n, p in head.items()} | {"image": image.grad}
    return tokens, logits, infos, grads


@pytest.mark.parametrize("attention_gradient", [True, False])
def test_evit_reproduces_the_official_run(golden, attention_gradient):
    case, model = loaded(golden, "evit")
    strategy = EViT(0.7, attention_gradient=attention_gradient)
    tokens, logits, infos, grads = run(case, model, strategy)
    assert [info.stage.first for info in infos] == [3, 6, 9]
    close = {"atol": 1e-5, "rtol": 0}
    for s, info in enumerate(infos):
        assert torch.equal(info.reduction.kept - 1, case[f"stage{s}/idx"].long())
        row = info.attention[:, 1:]
        torch.testing.assert_close(row, case[f"stage{s}/cls_attn"], atol=1e-6, rtol=0)
    torch.testing.assert_close(tokens, case["out_tokens"], **close)
    torch.testing.assert_close(logits, case["logits"], **close)
    if attention_gradient:
        check_gradients(grads, case.under("grad/"))
    else:
        assert not torch.allclose(grads["image"], case["grad/image"], atol=1e-4)


@pytest.mark.parametrize("prefix", ["r4/", "r8/", "r8_noprop/"])
def test_tome_reproduces_the_official_run(golden, prefix):
    case, model = loaded(golden, "tome")
    strategy = ToMe(r=int(prefix[1]), proportional="noprop" not in prefix)
    tokens, logits, infos, grads = run(case, model, strategy, prefix)
    torch.testing.assert_close(tokens, case[f"{prefix}out_tokens"], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, case[f"{prefix}logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(infos[-1].sizes, case[f"{prefix}size_final"].flatten(1))
    check_gradients(grads, case.under(f"{prefix}grad/"))


LIBRARIES = ["timm", "open_clip", "HF CLIP", "HF BLIP"]
OWN_CASES = {
    "elip": ELIP(SCHEDULE, scorer="exact"),
    "evit": EViT(0.7, layers=(1, 3)),
    "evit every layer": EViT(0.8, layers="all", attention_gradient=False),
    "tome": ToMe(4),
    "merge": TokenMerging(4),
    "tome to the class token": ToMe((4, 0, 3, 3, 3, 0), class_token_only=True),
    "tome list": ToMe((0, 5, 0, 3, 2, 20), proportional=False),
    "guided_tome": GuidedToMe((4, 0, 4, 5, 2, 20), protect=0.6, weight=0.5),
    "trips": TRIPS(SCHEDULE),
    "patch_dropout": PatchDropout(0.5),
    "random": RandomPruning(SCHEDULE),
    "resize": ImageResize(32),
    "nearest": ELIP(SCHEDULE, merge="nearest"),
    "proportional": ELIP(SCHEDULE, merge="nearest", proportional=True),
    "nearest evit": EViT(0.7, layers=(1, 3), merge="nearest"),
}
STRATEGIES = with_every_strategy(OWN_CASES)
OTHERS = {
    "HF SigLIP": siglip_vision,
    "rotary": lambda: eva(qk_norm=True),
    "registers": lambda: plain_vit(reg_tokens=2),
    "rotary registers": lambda: eva(num_reg_tokens=2),
}
EVERY_TOWER = TOWERS | OTHERS
OF_EACH = {s.name: s for s in reversed(STRATEGIES.values())}.values()
strategies = pytest.mark.parametrize(
    "strategy", slow_except(OF_EACH, STRATEGIES.values()), ids=STRATEGIES
)


def patched(model, strategy, x, t, call=None):
    """Return the output of the reduced model, with random draws of seed 1."""
    elip_models.reduce_(model, strategy=strategy)
    torch.manual_seed(1)
    with elip_models.guidance(model, t):
        return output(model if call is None else call, x)


OF_CLS = ("evit", "evit every layer", "nearest evit", "tome to the class token")
REFUSED = {("HF SigLIP", name) for name in OF_CLS}
PLACED = ["timm BEiT", "timm relative positions", "HF DINOv3"]
REFUSED |= {(tower, name) for tower in PLACED for name in ("resize", "resize_merge")}
PAIRS = [(library, name) for library in [*LIBRARIES, *OTHERS, *PLACED] for name in STRATEGIES]
MECHANISMS = ["elip", "tome", "resize"]  # before a block, in its place, before the tower
QUICK = [pair for pair in PAIRS if pair not in REFUSED and (pair[0] == "timm" or pair[1] == "elip")]
FURTHER = [
    ("open_clip", "evit"),
    ("HF CLIP", "tome to the class token"),
    ("HF BLIP", "guided_tome"),
    ("HF SigLIP", "resize"),
    ("rotary", "proportional"),
    ("rotary registers", "merge"),
    ("timm BEiT", "tome list"),
    ("timm relative positions", "patch_dropout"),
    ("HF DINOv3", "nearest evit"),
]


@pytest.mark.parametrize(("library", "name"), sorted(REFUSED))
def test_a_tower_raises_for_a_strategy_that_it_does_not_support(library, name):
    with pytest.raises(TypeError, match=f"got '{STRATEGIES[name].name}': "):
        elip_models.reduce_(EVERY_TOWER[library](), strategy=STRATEGIES[name])


@UNGUIDED
@pytest.mark.parametrize(
    ("library", "name"),
    slow_except(QUICK, [*QUICK, *FURTHER]),
)
def test_a_patched_model_equals_encode_image(library, name):
    model, strategy, x, t = EVERY_TOWER[library](), STRATEGIES[name], images(), text()
    model.train()
    dense, keys, tower = output(model, x), list(model.state_dict()), as_tower(model)
    torch.manual_seed(1)
    tokens, infos = elip_models.encode_image(model, x, t, strategy=strategy, return_info=True)
    counts = strategy.token_counts(tower.size)
    assert tokens.shape == (2, counts[-1].mlp, WIDTH)
    assert len(infos) <= len(strategy.stages(tower.size))
    seen = []
    handle = tower.blocks[-1].register_forward_hook(lambda m, args, out: seen.append(out))
    reduced = patched(model, strategy, x, t)
    handle.remove()
    on_grid = infos and tower.pools and strategy.merge != "none"
    left = whole_grid(tokens, infos) if on_grid else tokens
    assert torch.equal(tower.finish(seen[-1]), left)
    assert not torch.equal(reduced, dense)  # though merging by size hardly moves a mean
    assert list(model.state_dict()) == keys
    reduced.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    elip_models.unreduce_(model)
    assert torch.equal(output(model, x), dense)


@UNGUIDED
@strategies
def test_every_block_runs_on_the_counted_tokens(strategy):
    model, x, t = plain_vit(), images(), text()
    seen = {}

    def note(module, args, out):
        if torch.is_grad_enabled():  # what chooses runs without
            seen[module] = out.shape[1]

    norms = [(block.norm1, block.norm2) for block in model.blocks]
    for norm in chain.from_iterable(norms):
        norm.register_forward_hook(note)
    patched(model, replace(strategy, scorer="last") if strategy.name == "elip" else strategy, x, t)
    expected = strategy.token_counts(as_tower(model).size)
    assert [(seen[first], seen[second]) for first, second in norms] == list(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "name"), [*(("timm", name) for name in MECHANISMS), ("HF CLIP", "elip")]
)
def test_compiles_whole_forward_and_backward(library, name):
    torch._dynamo.reset()
    model, strategy, x, t = TOWERS[library](), STRATEGIES[name], images(), text()
    expected = patched(model, strategy, x, t)
    expected.square().sum().backward()
    trained = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    other = patched(model, strategy, x, 2 * t, compiled)
    got = patched(model, strategy, x, t, compiled)
    got.square().sum().backward()
    assert gradients(model).keys() == trained.keys()
    if strategy.name not in ("random", "patch_dropout"):  # whose draws are the compiler's own
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert_equal_gradients(gradients(model), trained, atol=1e-4, rtol=1e-4)
        assert strategy.is_guided or torch.equal(other, got)


@UNGUIDED
def test_a_whole_model_encodes_text_first_only_for_strategies_that_read_it():
    model = open_clip_pair()
    calls = []
    model.transformer.register_forward_hook(lambda *args: calls.append(1))
    x, tokens = images(), ids(2)
    for strategy in STRATEGIES.values():
        calls.clear()
        elip_models.reduce_(model, strategy=strategy)(x, tokens)
        assert len(calls) == 1, strategy
        with elip_models.guidance(model, paired=True):
            model(x, tokens)
        assert len(calls) == 2 + strategy.is_guided, strategy


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EViT(layers=(3, 1)), "layers: expected rising"),
        (lambda: GuidedToMe(protect=1.0), r"protect: expected a number in \[0, 1\), got 1"),
        (lambda: ELIP(proportional=True), "proportional: expected False unless merge='nearest'"),
        (lambda: elip_models.reduce_(plain_vit(), strategy=ToMe((1, 2))), "r: expected 6 numbers"),
        (
            lambda: elip_models.reduce_(plain_vit(), strategy=EViT(layers=(9,))),
            "layers: .* below 6",
        ),
        (lambda: elip_models.reduce_(plain_vit(), strategy=ImageResize(30)), "size: .* multiple"),
        (
            lambda: elip_models.reduce_(plain_vit(), strategy="tome", fusion=0.5),
            "fusion: expected none with strategy='tome', which takes r, proportional, compare, ",
        ),
        (
            lambda: elip_models.reduce_(plain_vit(), strategy=ToMe(4), schedule=SCHEDULE),
            r"schedule: expected it inside the instance, tome\(schedule",
        ),
        (
            lambda: elip_models.reduce_(plain_vit(), "elip:scorer=cls", scorer="exact"),
            "scorer: expected it once",
        ),
    ],
)
def test_a_bad_setting_is_named(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
