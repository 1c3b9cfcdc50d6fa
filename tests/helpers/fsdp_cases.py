"""FSDP2 with every block sharded against the same model unsharded, as two processes see it.

Each process takes half of the batch, in fp64; FSDP means the gradients of the two.
"""

import copy
from functools import partial

import open_clip
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import elip_models
from elip_models import (
    ELIP,
    EViT,
    GuidedToMe,
    ImageResize,
    PatchDropout,
    RandomPruning,
    ToMe,
)
from elip_models.towers import as_tower
from tests.helpers.models import TOWERS
from tests.helpers.strategies import with_every_strategy
from tests.helpers.towers import WIDTH, clip_vit, images, plain_vit, text

SCORERS = ["official", "exact", "attention", "cls", "last", "received", 2]
SCHEDULE = "2(100%) 2(80%) 2(40%)"
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def shard(model, root=None, **options):
    """Every block of the model's towers, and the model."""
    units = ("Block", "CLIPEncoderLayer", "VisionTransformer")
    for module in reversed(list(model.modules())):  # from the inside out
        if type(module).__name__.endswith(units) and module is not model:
            fully_shard(module, **options)
    return fully_shard(model, **(options if root is None else root))


def half(rank, batch):
    return batch[2 * rank : 2 * rank + 2]


def shard_of(value):
    """What this process holds of a tensor, sharded or not."""
    if isinstance(value, DTensor):
        return value.to_local()
    rank, shards = torch.distributed.get_rank(), value.chunk(2)
    return shards[rank] if rank < len(shards) else value[:0]


def mean_gradients(model):
    """In place, as FSDP leaves them."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if not any(isinstance(grad, DTensor) for grad in grads):
        mean = torch.cat([grad.flatten() for grad in grads]) / 2
        torch.distributed.all_reduce(mean)
        for grad, part in zip(grads, mean.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def step(model, forward):
    """`forward()`, the tokens after the last block, this process's shard of the mean gradients."""
    tokens = []
    handle = blocks(model)[-1].register_forward_hook(lambda m, a, out: tokens.append(out))
    model.zero_grad()
    torch.manual_seed(5)
    out = forward()
    handle.remove()
    out.square().sum().backward()
    grads = {name: shard_of(grad) for name, grad in mean_gradients(model).items()}
    model.zero_grad()
    return {"output": out.detach(), "tokens": (tokens or [out])[-1].detach()} | grads


def blocks(model):
    return as_tower(getattr(model, "visual", model)).blocks


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            got[name], expected[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_sharded(model):
    """No block was left gathered."""
    for block in blocks(model):
        assert all(isinstance(p, DTensor) for p in block.parameters())


def inputs(rank):
    return half(rank, images(4)).double(), half(rank, text(4)).double()


def guided(model, x, t):
    with elip_models.guidance(model, t):
        out = model(x)
    return out if torch.is_tensor(out) else out.image_embeds


def patched(rank, make=clip_vit, order="reduce_", run=guided, **settings):
    if "strategy" not in settings:
        settings = {"schedule": SCHEDULE, "scorer": "exact"} | settings
    model, (x, t) = make().double(), inputs(rank)
    sharded = copy.deepcopy(model)
    elip_models.reduce_(model, **settings)
    expected = step(model, lambda: run(model, x, t))
    if order == "reduce_":
        elip_models.reduce_(sharded, **settings)
    shard(sharded)
    if order == "fully_shard":
        elip_models.reduce_(sharded, **settings)
    assert list(sharded.state_dict()) == list(model.state_dict())
    for _ in range(2):  # the second step finds FSDP's state as the first left it
        assert_same(step(sharded, lambda: run(sharded, x, t)), expected)
    assert_sharded(sharded)


def encode_image(rank, make=clip_vit, **settings):
    if "strategy" not in settings:
        settings = {"schedule": SCHEDULE} | settings
    model, (x, t) = make().double(), inputs(rank)
    sharded = shard(copy.deepcopy(model))
    run = partial(elip_models.encode_image, images=x, text_cls=t, **settings)
    assert_same(step(sharded, lambda: run(sharded)), step(model, lambda: run(model)))
    kept = []
    for m in (sharded, model):
        torch.manual_seed(5)
        kept.append([info.reduction.source_map() for info in run(m, return_info=True)[1]])
    assert all(map(torch.equal, *kept))
    assert_same(step(sharded, lambda: sharded(x)), step(model, lambda: model(x)))
    assert_sharded(sharded)


def without_gradient(rank, scorer):
    """And no block is whole while another one runs."""
    model, (x, t) = clip_vit().double().eval(), inputs(rank)
    sharded = copy.deepcopy(model)
    for m in (model, sharded):
        elip_models.reduce_(m, schedule=SCHEDULE, scorer=scorer)
    shard(sharded)
    whole = []
    for block in sharded.blocks:
        block.mlp.register_forward_pre_hook(lambda *_: whole.append(number_gathered(sharded)))
    with torch.no_grad():
        torch.testing.assert_close(guided(sharded, x, t), guided(model, x, t), **CLOSE)
    assert max(whole) <= 2  # the first block of a stage, and one that its hook scores by
    assert sum(n > 1 for n in whole) == (2 if scorer == "official" else 0)
    assert_sharded(sharded)


def number_gathered(model):
    return sum(not isinstance(block.norm1.weight, DTensor) for block in model.blocks)


def undone(rank):
    model, (x, t) = clip_vit().double(), inputs(rank)
    sharded = shard(elip_models.reduce_(copy.deepcopy(model), schedule=SCHEDULE))
    guided(sharded, x, t)
    elip_models.unreduce_(sharded)
    assert_same(step(sharded, lambda: sharded(x)), step(model, lambda: model(x)))


def optimized(rank):
    """Three steps of AdamW, then the state dicts are the same."""
    model, (x, t) = clip_vit().double(), inputs(rank)
    sharded = copy.deepcopy(model)
    for m in (model, sharded):
        elip_models.reduce_(m, schedule=SCHEDULE, scorer="exact")
    shard(sharded)
    for m in (model, sharded):
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            guided(m, x, t).square().mean().backward()
            mean_gradients(m)
            optimizer.step()
    states = (m.state_dict() for m in (sharded, model))
    assert_same(*({name: shard_of(value) for name, value in state.items()} for state in states))


def mixed_precision(rank, forward, blocks_alone=False):
    """bf16 parameters, of the blocks alone: all is finite, and as many tokens are kept."""
    output_dtype = torch.float32 if blocks_alone else None
    options = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype)}
    x, t = (part.float() for part in inputs(rank))
    for scorer in SCORERS:
        model = clip_vit()
        if forward is guided:
            elip_models.reduce_(model, schedule=SCHEDULE, scorer=scorer)
        run = partial(forward, shard(model, {} if blocks_alone else None, **options), x, t)
        got = step(model, partial(run, scorer=scorer) if forward is encoded else run)
        assert got["tokens"].shape == (2, 14 + 2, WIDTH)
        assert all(value.isfinite().all() for value in got.values())
        missing = {name for name, _ in model.named_parameters()} - got.keys()
        assert missing == ({"head.weight", "head.bias"} if forward is encoded else set())


def encoded(model, x, t, scorer):
    return elip_models.encode_image(model, x, t, schedule=SCHEDULE, scorer=scorer)


def checkpointed(make):
    model = make()
    model.set_grad_checkpointing()
    return model


def dropping():
    return clip_vit(proj_drop_rate=0.2, drop_path_rate=0.2)


def open_clip_pair():
    vision = {"layers": 6, "width": WIDTH, "head_width": 16, "image_size": 48, "patch_size": 8}
    words = {"context_length": 8, "vocab_size": 50, "width": 24, "heads": 2, "layers": 2}
    return open_clip.CLIP(16, vision, words, nonscalar_logit_scale=True)  # FSDP2 takes no scalars


def paired(model, x, t):
    """Image and text features of a whole CLIP; the words are made of the guidance."""
    words = t[:, :8].abs().mul(20).long().clamp(max=49)
    with elip_models.guidance(model, paired=True):
        out = model(x, words)
    return torch.cat(out[:2])


def with_lora():
    import peft

    config = peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False)
    return peft.get_peft_model(clip_vit(), config).get_base_model()


def part_of_a_sharded_model(rank):
    whole = fully_shard(nn.Sequential(clip_vit()))
    try:
        elip_models.encode_image(whole[0], images(), schedule=SCHEDULE)
    except ValueError as error:
        assert "fully_shard it too" in str(error)
    else:
        raise AssertionError("it was taken")


OWN_CASES = {
    "evit": EViT(0.7, layers=(1, 3)),
    "evit without gradient": EViT(0.7, layers=(1, 3), attention_gradient=False),
    "tome": ToMe(4),
    "guided_tome": GuidedToMe(4),
    "patch_dropout": PatchDropout(0.5),
    "random": RandomPruning(SCHEDULE),
    "resize": ImageResize(32),
    "nearest": ELIP(SCHEDULE, merge="nearest"),
}
STRATEGIES = with_every_strategy(OWN_CASES, leave_out=["trips"])  # a scorer of ELIP

CASES = {
    **{f"patched {name}": partial(patched, strategy=s) for name, s in STRATEGIES.items()},
    "encode_image resize": partial(encode_image, strategy=STRATEGIES["resize"]),
    "sharded first": partial(patched, scorer="last", order="fully_shard"),
    "encode_image official": partial(encode_image, scorer="official"),
    "query norm": partial(patched, make=lambda: plain_vit(qk_norm=True), scorer="cls"),
    "LoRA": partial(patched, make=with_lora, scorer="last"),
    "checkpointing": partial(patched, make=lambda: checkpointed(dropping)),
    "without gradient": partial(without_gradient, scorer="official"),
    "unreduce_": undone,
    "optimizer and state dict": optimized,
    "a whole open_clip CLIP": partial(patched, make=open_clip_pair, run=paired, scorer="cls"),
    "HF CLIP": partial(patched, make=TOWERS["HF CLIP"], order="fully_shard", scorer="official"),
    "bf16": partial(mixed_precision, forward=guided),
    "bf16 blocks in encode_image": partial(mixed_precision, forward=encoded, blocks_alone=True),
    "a part of a sharded model is refused": part_of_a_sharded_model,
}
