"""DistributedDataParallel, half of the batch each, against one process with the whole of it."""

import copy
from dataclasses import replace
from functools import partial
from unittest import mock

import open_clip
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import elip_models
from elip_models.pretraining.models.layers.losses import contrastive_loss, sigmoid_loss
from tests.helpers.fsdp_cases import CLOSE, half, open_clip_pair
from tests.helpers.towers import SCHEDULE, assert_equal_gradients, clip_vit, gradients, images, text
from tests.pretraining.models.test_clip import tiny
from tests.pretraining.models.test_gradient_caching import SIZES


def tower(rank, scorer):
    """Guided from outside: the gradients are the mean of what the halves give."""
    model, x, t = clip_vit().double(), images(4).double(), text(4).double()
    elip_models.reduce_(model, schedule=SCHEDULE, scorer=scorer, fusion=0.3)
    with elip_models.guidance(model, t):
        expected = model(x)
    expected.square().sum(1).mean().backward()
    wrapped = DistributedDataParallel(copy.deepcopy(model))
    wrapped.zero_grad()
    for _ in range(2):
        with elip_models.guidance(wrapped, half(rank, t)):
            out = wrapped(half(rank, x))
        wrapped.zero_grad()
        out.square().sum(1).mean().backward()
        torch.testing.assert_close(out, half(rank, expected))
        assert_equal_gradients(gradients(wrapped.module), gradients(model), **CLOSE)


def contrastive(rank, local_loss, scorer="last"):
    """Texts of a whole CLIP guide it; open_clip's own loss gathers features with gradient."""
    model, x = open_clip_pair().double(), images(4).double()
    words = torch.randint(1, 49, (4, 8))
    elip_models.reduce_(model, schedule=SCHEDULE, scorer=scorer)
    other = copy.deepcopy(model)
    with elip_models.guidance(model, paired=True):
        open_clip.ClipLoss()(*model(x, words)).backward()
    loss = open_clip.ClipLoss(local_loss=local_loss, gather_with_grad=True, rank=rank, world_size=2)
    wrapped = DistributedDataParallel(other)
    with elip_models.guidance(wrapped, paired=True):
        outputs = wrapped(half(rank, x), half(rank, words))
    loss(*outputs).backward()
    assert_equal_gradients(gradients(other), gradients(model), **CLOSE)


def gathered(rank, loss_of=contrastive_loss, scalars=(10.0,)):
    """A loss of ours: 'global' is the loss of all six pairs, 'local' of the rank's own."""
    image, text = (F.normalize(torch.randn(6, 5), dim=-1) for _ in range(2))
    leaves = [t.requires_grad_() for t in (image, text, *map(torch.tensor, scalars))]
    whole = loss_of(*leaves)
    expected = torch.autograd.grad(whole, leaves)
    own = [*(t.detach().chunk(2)[rank].requires_grad_() for t in (image, text)), *leaves[2:]]
    loss = loss_of(*own, gather="global")
    mean = [grad / 2 for grad in (*torch.autograd.grad(loss, own), loss.detach())]
    for total in mean[2:]:  # the scalars' gradients, and the loss
        torch.distributed.all_reduce(total)
    expected = [*(grad.chunk(2)[rank] for grad in expected[:2]), *expected[2:], whole.detach()]
    for got, wanted in zip(mean, expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)
    with mock.patch("torch.distributed.is_initialized", return_value=False):
        alone = loss_of(*own)
    torch.testing.assert_close(loss_of(*own, gather="local"), alone, atol=1e-6, rtol=0)


def in_slices(rank):
    """Gradient caching: each rank's half in two slices, the loss over all, recomputed blocks."""
    torch.manual_seed(0)
    model = tiny(**SIZES, gather="global").double()
    batch = {
        "images": torch.randn(4, 3, 32, 32).double(),
        "input_ids": torch.randint(3, 40, (4, 8)),
    }
    batch["input_ids"][:, -1] = model.config.eos_token_id
    whole = copy.deepcopy(model)
    whole.config = replace(model.config, gather="local")
    whole(**batch).loss.backward()
    model.set_batch_slices(2)
    model.set_grad_checkpointing()
    wrapped = DistributedDataParallel(model)
    wrapped(**{name: half(rank, each) for name, each in batch.items()}).loss.backward()
    assert_equal_gradients(
        gradients(model), gradients(whole), rtol=1e-6, atol=1e-6
    )  # the loss is fp32


CASES = {
    "gradient caching": in_slices,
    "timm tower": partial(tower, scorer="exact"),
    "open_clip, loss over all": partial(contrastive, local_loss=False),
    "open_clip, loss of each": partial(contrastive, local_loss=True, scorer="exact"),
    "contrastive loss over all": gathered,
    "sigmoid loss over all": partial(gathered, loss_of=sigmoid_loss, scalars=(10.0, -4.0)),
}
