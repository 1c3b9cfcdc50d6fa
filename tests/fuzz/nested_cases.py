"""Models inside models, reduced, restored and copied in random order.

Each model must return the bits of the same weights reduced alone: a reduction belongs to the model
that was passed, whatever module it is a part of.
"""

import copy
import io

import torch
import transformers
from torch import nn

from elip_models.api import is_reduced, reduce_, reduction_summary, unreduce_
from tests.fuzz.harness import Loss, kind
from tests.helpers.towers import plain_vit

STRATEGIES = ("tome", "merge", "evit", "elip", "resize_merge")
KEEPS = (0.9, 0.7, 0.5)
LARGEST = 6  # models in one
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 2}
VISION = SIZES | {"image_size": 48, "patch_size": 8}
TEXT = SIZES | {"vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49}


def vit():
    return plain_vit(depth=4)


def hf_vit():
    return transformers.ViTModel(transformers.ViTConfig(**VISION))


def hf_clip():
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=VISION))


CLASSES = (vit, vit, hf_vit, hf_clip)


def new(rng):
    """A model with what it must be: None for dense, or the strategy and the keep."""
    model = rng.choice(CLASSES)().eval()
    model.expected = None  # copies and files have it too
    return model


def models_in(root):
    return [module for module in root.modules() if hasattr(module, "expected")]


def attach(model, models, rng):
    """Give a model an inner one: a new one, one that is used elsewhere too, or its own copy."""
    others = [other for other in models if model not in models_in(other)]
    ways = (lambda: new(rng), lambda: rng.choice([new(rng), *others]), lambda: copy.deepcopy(model))
    setattr(model, f"inner{len(models)}", rng.choice(ways)())


def through_file(root):
    file = io.BytesIO()
    torch.save(root, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def change(root, rng):
    """Do one thing to a model in a container; return the container and what was done."""
    models = models_in(root)
    model, way = rng.choice(models), rng.random()
    name = next(name for name, module in root.named_modules() if module is model)
    if way < 0.45:
        model.expected = rng.choice(STRATEGIES), rng.choice(KEEPS)
        reduce_(model, model.expected[0], keep=model.expected[1])
        return root, f"reduce_({name}, {model.expected})"
    if way < 0.65:
        unreduce_(model).expected = None
        return root, f"unreduce_({name})"
    if way < 0.85:
        if len(models) < LARGEST:
            attach(model, models, rng)
        return root, f"attach to {name}"
    if way < 0.95:
        return copy.deepcopy(root), "deepcopy"
    return through_file(root), "save and load"


def output(model, inputs):
    torch.manual_seed(0)
    if isinstance(model, transformers.CLIPModel):
        return model(**inputs).logits_per_image
    out = model(inputs["pixel_values"])
    return out if isinstance(out, torch.Tensor) else out.last_hidden_state


def alone(model):
    """A model of the same class and weights, with nothing inside, reduced as `model` must be."""
    makers = {transformers.ViTModel: hf_vit, transformers.CLIPModel: hf_clip}
    fresh, weights = makers.get(type(model), vit)().eval(), model.state_dict()
    fresh.load_state_dict({name: weights[name] for name in fresh.state_dict()})
    if model.expected is None:
        return fresh
    strategy, keep = model.expected
    return reduce_(fresh, strategy, keep=keep)


def check(model, inputs, words):
    """Raise Loss unless a model is as one that is reduced alone, and called twice."""
    expected = alone(model)
    if is_reduced(model) != (model.expected is not None):
        raise Loss(f"is_reduced is {is_reduced(model)}: {words}")
    if str(reduction_summary(model)) != str(reduction_summary(expected)):
        raise Loss(f"another summary, {reduction_summary(model)}: {words}")
    right = output(expected, inputs)
    if not all(torch.equal(output(model, inputs), right) for _ in range(2)):
        raise Loss(f"other outputs: {words}")


@kind(share=2, seconds=30)
@torch.no_grad()
def nested_models(folder, rng):
    torch.manual_seed(rng.randrange(2**31))
    ids = torch.randint(3, 48, (2, 6))
    ids[:, -1] = TEXT["eos_token_id"]
    inputs = {"pixel_values": torch.randn(2, 3, 48, 48), "input_ids": ids}
    root, done = nn.ModuleList(new(rng) for _ in range(rng.choice((1, 2)))), []
    for _ in range(rng.randrange(2, 9)):
        root, words = change(root, rng)
        done.append(words)
    for model in models_in(root):
        check(model, inputs, f"{model.expected} after {'; '.join(done)}")
    return "read"
