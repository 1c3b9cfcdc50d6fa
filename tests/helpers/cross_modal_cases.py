"""ALBEF, BLIP and METER on two processes of two pairs each, under DistributedDataParallel or FSDP2.

'global': what one process gives with all four pairs. 'local': what one process gives with each
rank's pairs, but for the queue, which takes the features of all ranks.
"""

import copy
from functools import partial
from unittest import mock

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from elip_models.pretraining.models.albef import model as albef
from elip_models.pretraining.models.blip import model as blip
from elip_models.pretraining.models.meter import model as meter
from elip_models.pretraining.models.momentum_model import Negatives
from elip_models.pretraining.models.registry import DOWNSTREAM
from tests.helpers.fsdp_cases import half
from tests.helpers.towers import assert_equal_gradients, gradients

VOCABULARY, LENGTH, MASK = 40, 8, 3
REAL = (8, 7, 4, 3)  # tokens of each text: the ranks' counts differ
SIZES = {
    "image_size": 16,
    "patch_size": 4,
    **{f"{part}_width": 16 for part in ("vision", "text")},
    **{f"{part}_heads": 2 for part in ("vision", "text")},
    "vision_depth": 3,
    "text_depth": 2,
    "text_hidden": 32,
    "context_length": LENGTH,
    "max_positions": LENGTH,
    "vocab_size": VOCABULARY,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "schedule": "1(100%) 1(75%) 1(50%)",
}
DISTILLED = {"text_dropout": 0.0, "embed_dim": 8, "queue_size": 6, "momentum": 0.5}
CROSS = {f"cross_{name}": value for name, value in (("width", 16), ("depth", 2), ("heads", 2))}
MODELS = {
    "albef": (albef.ALBEF, {**DISTILLED, "text_layers": 1, "mask_token_id": MASK}),
    "blip": (blip.BLIP, {**DISTILLED, "decoder_token_id": 4, "encoder_token_id": 5}),
    "meter": (meter.METER, {**CROSS, "cross_hidden": 32, "dropout": 0.0, "mask_token_id": MASK}),
}
OF_TASKS = {"albef_entailment": {"num_classes": 3}, "albef_nlvr2": {"num_classes": 2}}
OF_TASKS |= {"blip_vqa": {"drop_path": 0.0}, "blip_nlvr2": {"drop_path": 0.0, "merge_from": 1}}
OF_TASKS |= {"meter_vqa": {"num_classes": 5}, "meter_retrieval": {"false_texts": 2}}
TASKS = {
    name: (model, MODELS[model.pretraining.family][1] | OF_TASKS.get(name, {}))
    for name, model in DOWNSTREAM.items()
    if model.pretraining.family in MODELS
}
RETRIEVAL = ("albef_retrieval",)
IMAGE_IDS = (7, 3, 7, 5)  # of four pairs for retrieval: both ranks show the first image
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # the losses are fp32


def made(family, gather="local", **options):
    """A model in fp64, with weights that matter."""
    model_class, own = (MODELS | TASKS)[family]
    sizes = SIZES | own | {"gather": gather} | options
    model = model_class(model_class.config_class(**sizes)).double()
    online = getattr(model, "encoders", model)
    for weight in online.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.2)
    model.reset_momentum_()
    return model


def batch_for(model):
    """The random inputs of a model for four images, with texts of several lengths."""
    images, ids, mask = batch_of_four()
    return model.random_inputs(images) | {"input_ids": ids, "attention_mask": mask}


def batch_of_four(family=None):
    """images, ids and mask of four pairs, for retrieval also which image each shows; the texts of
    the first two are longer."""
    ids = torch.randint(6, VOCABULARY, (4, LENGTH))
    mask = (torch.arange(LENGTH) < torch.tensor(REAL)[:, None]).long()
    ids[:, 0] = 1
    shown = [torch.tensor(IMAGE_IDS)] if family in RETRIEVAL else []
    return torch.randn(4, 3, 16, 16).double(), ids * mask, mask, *shown


def draws(family, images, ids, mask, gather):
    """What `forward` would draw for four pairs: negatives of all pairs, or of the own rank's."""
    other = torch.arange(4)
    other = (other + torch.tensor([2, 1, 3, 2])) % 4 if gather == "global" else (other + 1) % 2
    labels = torch.where((mask == 1) & (torch.arange(LENGTH) > 0), ids, -100)
    labels[0, 1], labels[3, 2:] = -100, -100
    masked = torch.where(labels == -100, ids, MASK)
    if family == "albef":
        return albef.ALBEFDraw(
            other, other.flip(0) if gather == "global" else other, masked, labels
        )
    if family == "blip" or family in RETRIEVAL:
        return Negatives(other, other)
    itm_labels, false_images = torch.tensor([1, 0, 0, 1]), torch.randn_like(images)
    return meter.METERDraw(masked, labels, itm_labels, false_images)


def halved(rank, drawn):
    return type(drawn)(*(half(rank, values) for values in drawn))


def alone():
    """As if there were one process."""
    return mock.patch("torch.distributed.is_initialized", return_value=False)


def losses(out):
    return torch.stack([loss.detach().double() for n, loss in vars(out).items() if "loss" in n])


def of_all_ranks(values):
    parts = [torch.empty_like(values) for _ in range(2)]
    torch.distributed.all_gather(parts, values)
    return torch.stack(parts)


def step(model, batch, drawn):
    """The losses of a step, (parts,), and the gradients."""
    model.zero_grad()
    out = model(*batch, drawn=drawn)
    out.loss.backward()
    return losses(out), gradients(getattr(model, "module", model))


def check_checkpointing(model):
    """Every weight gets a gradient, and checkpointing changes no loss and no gradient of a step."""
    batch, other, steps = batch_for(model), copy.deepcopy(model), []
    other.set_grad_checkpointing()
    for run in (model, other):
        torch.manual_seed(3)
        out = run(**batch)
        out.loss.backward()
        steps.append((losses(out), gradients(run)))
    (expected, expected_gradients), (got, got_gradients) = steps
    assert expected.isfinite().all() and torch.equal(got, expected)
    assert expected_gradients.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert_equal_gradients(got_gradients, expected_gradients)


def descend(model):
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()


def assert_equal_state(got, expected):
    """Parameters, momentum parameters, queue and pointer."""
    got, expected = got.state_dict(), expected.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def whole_batch(rank, family, checkpointing=False, **options):
    """'global', two steps: the second sees the queue that the first moved, and wraps around."""
    model = made(family, "global", **options)
    single = copy.deepcopy(model)
    model.set_grad_checkpointing(checkpointing)
    wrapped = DistributedDataParallel(model)
    for _ in range(2):
        batch = batch_of_four(family)
        drawn = draws(family, *batch[:3], "global")
        with alone():
            expected, expected_gradients = step(single, batch, drawn)
        got, got_gradients = step(wrapped, [half(rank, t) for t in batch], halved(rank, drawn))
        torch.testing.assert_close(of_all_ranks(got).mean(0), expected, **CLOSE)
        assert_equal_gradients(got_gradients, expected_gradients, **CLOSE)
        descend(model)
        descend(single)
        assert_equal_state(model, single)


def own_pairs(rank, family):
    """'local', two steps: each rank's losses are those of its pairs, and the queue is one."""
    model = made(family, "local")
    single = copy.deepcopy(model)
    wrapped = DistributedDataParallel(model)
    for _ in range(2):
        batch = batch_of_four()
        drawn = draws(family, *batch, "local")
        slices = [copy.deepcopy(single) for _ in range(2)]
        with alone():
            expected, expected_gradients = zip(
                *(
                    step(one, [half(r, t) for t in batch], halved(r, drawn))
                    for r, one in enumerate(slices)
                ),
                strict=True,
            )
        got, got_gradients = step(wrapped, [half(rank, t) for t in batch], halved(rank, drawn))
        torch.testing.assert_close(of_all_ranks(got), torch.stack(expected), **CLOSE)
        mean = {n: (g + expected_gradients[1][n]) / 2 for n, g in expected_gradients[0].items()}
        assert_equal_gradients(got_gradients, mean, **CLOSE)
        join(single, slices)
        for name, parameter in single.named_parameters():
            parameter.grad = mean.get(name)
        descend(model)
        descend(single)
        assert_equal_state(model, single)


def join(single, slices):
    """Give `single` the momentum parameters of a slice's step, and the features of both."""
    if not hasattr(single, "queue"):
        return
    single.encoders_m.load_state_dict(slices[0].encoders_m.state_dict())
    places = (single.queue.pointer + torch.arange(2)) % single.queue.image.shape[1]
    for one in slices:
        single.queue.enqueue_(one.queue.image[:, places].T, one.queue.text[:, places].T)


def own_draws(rank, family, gather):
    """Negatives are of all ranks where 'global', of the own where 'local', and never the pair."""
    model = made(family, gather)
    torch.nn.init.constant_(model.temperature, 10.0)  # every pair is about as likely
    wrapped, drawn = DistributedDataParallel(model), []
    draw = model.draw
    model.draw = lambda *choices: drawn.append(draw(*choices)) or drawn[-1]
    torch.manual_seed(rank)
    batch = [half(rank, t) for t in batch_of_four()]
    for _ in range(6):
        got, _ = step(wrapped, batch, None)
        assert got.isfinite().all()
    own = torch.arange(2) + (2 * rank if gather == "global" else 0)
    negatives = torch.stack([torch.stack(sample[:2]) for sample in drawn])
    assert (negatives != own).all()
    assert set(negatives.unique().tolist()) == set(range(4 if gather == "global" else 2))


def sharded_meter(rank):
    """FSDP2 with every block and layer sharded: losses and gradients of one process."""
    model = made("meter", "global")
    single, batch = copy.deepcopy(model), batch_of_four()
    drawn = draws("meter", *batch, "global")
    with alone():
        expected, expected_gradients = step(single, batch, drawn)
    stacks = (model.text, model.text_layers, model.image_layers)
    for block in [*model.visual.blocks, *(layer for stack in stacks for layer in stack.layers)]:
        fully_shard(block)
    fully_shard(model)
    got, got_gradients = step(model, [half(rank, t) for t in batch], halved(rank, drawn))
    torch.testing.assert_close(of_all_ranks(got).mean(0), expected, **CLOSE)
    whole = {name: grad.full_tensor() for name, grad in got_gradients.items()}
    assert_equal_gradients(whole, expected_gradients, **CLOSE)


def sharded_momentum(rank, family):
    """FSDP2 in training is refused, and in evaluation it is not."""
    model = made(family, "local")
    batch = [half(rank, t) for t in batch_of_four()]
    for block in model.visual.blocks:
        fully_shard(block)
    with pytest.raises(TypeError, match=r"model: .*fully_shard"):
        model(*batch)
    assert model.eval()(*batch).loss.isfinite()


CASES = {
    **{f"{family}, global": partial(whole_batch, family=family) for family in MODELS},
    "albef, local": partial(own_pairs, family="albef"),
    **{f"{family}, global": partial(whole_batch, family=family) for family in RETRIEVAL},
    "albef, global, checkpointing": partial(whole_batch, family="albef", checkpointing=True),
    "blip, global, fewer texts": partial(whole_batch, family="blip", text_reduction="post"),
    "blip, global, own draws": partial(own_draws, family="blip", gather="global"),
    "meter, FSDP2": sharded_meter,
    "albef, FSDP2": partial(sharded_momentum, family="albef"),
}
