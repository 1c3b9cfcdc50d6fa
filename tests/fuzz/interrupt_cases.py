"""Ctrl-C at a random call inside a forward pass, a training step or `generate`.

The model must then do what it did before, with and without its contexts.
"""

import sys
from contextlib import ExitStack
from pathlib import Path

import timm
import torch
import transformers
from torch.nn import functional as F

import elip_kernels
import elip_models
from elip_models.api import budget, guidance, record_stages, reduce_
from tests.fuzz.harness import Loss, kind
from tests.helpers.towers import WIDTH, images, plain_vit
from tests.vlm import oracle
from tests.vlm.models import build

PACKAGES = (elip_kernels, elip_models, timm, transformers)
FOLDERS = tuple(str(Path(package.__file__).parent) for package in PACKAGES)
TOWERS = ("elip", "elip:scorer=exact", "tome", "evit", "merge", "resize_merge", "guided_tome")
LANGUAGE = ("diverse", "cdpruner", "visionzip", "pool", "fastv:layer=1", "pyramid:stages=3")
MODELS = {}
"""Strategy -> a model that it reduces, and the inputs of a language model."""


def raise_in_call(number, error, folders=FOLDERS):
    """Raise in the call of a function of these folders with this number, in this thread."""
    left = number

    def count(frame, event, _):
        nonlocal left
        left -= event == "call" and frame.f_code.co_filename.startswith(folders)
        if left <= 0:
            sys.setprofile(None)
            raise error

    sys.setprofile(count)


def make_models(folder):
    torch.manual_seed(0)
    for strategy in TOWERS:
        MODELS[strategy] = reduce_(plain_vit(depth=4).eval(), strategy, keep=0.6), None
    for strategy in LANGUAGE:
        model, inputs = build("llava")
        MODELS[strategy] = reduce_(model, strategy, keep=0.5), inputs


def run(strategy, way):
    """Return tensors of one call of a model, with one seed."""
    model, inputs = MODELS[strategy]
    torch.manual_seed(0)
    if inputs is not None:
        with ExitStack() as stack:
            if way == "context":
                stack.enter_context(budget(model, 4))
                stack.enter_context(record_stages(model))
            output = oracle.stock_generate(model, inputs, max_new_tokens=3)
        return list(output.logits)
    x, text = images(), torch.randn(2, WIDTH)
    if way == "training":
        model.set_grad_checkpointing(True)
        weights = [*model.parameters()]
        loss = F.cross_entropy(model(x), torch.tensor([1, 3]))
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        return [gradient for gradient in gradients if gradient is not None]
    model.set_grad_checkpointing(False)
    with ExitStack() as stack, torch.no_grad():
        if way == "context":
            stack.enter_context(guidance(model, text))
            stack.enter_context(record_stages(model))
        return [model(x)]


@kind(share=1, prepare=make_models, seconds=30)
def interrupts(folder, rng, prepared):
    strategy, way = rng.choice((*TOWERS, *LANGUAGE)), rng.choice(("plain", "context", "training"))
    expected = {way: run(strategy, way) for way in (way, "plain")}
    call = int(3000 ** rng.random())
    raise_in_call(call, KeyboardInterrupt())
    try:
        run(strategy, way)
        said = "read"
    except KeyboardInterrupt:
        said = "refused"
    finally:
        sys.setprofile(None)
    for again, values in expected.items():
        if not all(map(torch.equal, run(strategy, again), values)):
            raise Loss(f"{strategy}: {again} differs after call {call} of {way} was interrupted")
    return said
