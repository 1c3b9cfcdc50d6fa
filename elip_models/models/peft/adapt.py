"""Parameter-efficient tuning: small parts that train beside weights that stay as they are.

    lora      y = W x + b + (alpha / r) B A x      peft's, in the projections of attention
    adapter   y = W x + b;  y + U relu(D y)        a bottleneck behind each MLP

`adapt_` puts either into any model of ours, for pre-training and downstream alike. peft has no
bottleneck behind a layer (all of its methods change weights, prompts or biases), and `adapters`,
which has, takes models of transformers 4 alone: so it is written here.

Momentum encoders get adapters of their own, equal to the online ones at first, which follow those
by the same average as all other parameters. Of LoRA A and B follow, so that what the momentum
encoder adds is the product of two averages, and not the average of products.
Source: LoRA (Hu et al., 2022); Houlsby et al., 2019, at the one place of Pfeiffer et al., 2021.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_models.models.config import Config
from elip_models.validation import Positive, PositiveInt, Rate, require_extra

if TYPE_CHECKING:
    from elip_models.models.base import PretrainedModel

Targets = str | tuple[str, ...]
WITH_BERT: dict[str, Targets] = {
    "lora": ("attn.qkv", "query", "key", "value"),
    "adapter": r".*(blocks\.\d+\.mlp\.fc2|layers\.\d+\.output\.dense)",
}
TARGETS: dict[str, dict[str, Targets]] = {
    "clip": {"lora": ("attn.qkv", "q_proj", "k_proj", "v_proj"), "adapter": ("mlp.fc2",)},
    **dict.fromkeys(("albef", "blip", "meter"), WITH_BERT),
}
"""What is adapted by default in a model, and in those that begin as it, by the kind: queries, keys
and values of all attention; the last layer of each MLP."""
TEMPERATURES = ("temperature", "logit_scale", "logit_bias")
READ = {"clip": ("image_projection", "text_projection")}
"""What a model also reads as a weight, to map features back."""


@dataclass(frozen=True, kw_only=True)
class AdaptConfig(Config):
    """How a model is tuned.

    kind: 'lora', 'adapter', or None, which trains all parameters.
    r, alpha, dropout: LoRA's rank, its scale alpha / r, and the dropout of what enters it.
    width: of the bottleneck of 'adapter'.
    target_modules: layers that are adapted, by how their names end, or by one regular expression
        of whole names, as peft has it; None: `TARGETS`.
    full: patterns of names of parameters that train too, `*` for any part; None: temperatures, and
        what a downstream model does not begin with as its pre-trained one, such as a new head.
    """

    kind: Literal["lora", "adapter"] | None = None
    r: PositiveInt = 8
    alpha: Positive = 16.0
    dropout: Rate = 0.0
    width: PositiveInt = 64
    target_modules: str | tuple[str, ...] | None = None
    full: tuple[str, ...] | None = None


class Adapted(NamedTuple):
    """How a model was adapted, and the names of the parameters that trained before."""

    config: AdaptConfig
    trained: frozenset[str]


class Bottleneck(nn.Module):
    """A linear layer and a bottleneck behind it, which changes nothing at first."""

    def __init__(self, base_layer: nn.Linear, width: int) -> None:
        super().__init__()
        like = {"device": base_layer.weight.device, "dtype": base_layer.weight.dtype}
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.base_layer = base_layer
        self.adapter_down = nn.Linear(self.out_features, width, **like)
        self.adapter_up = nn.Linear(width, self.out_features, **like)
        nn.init.zeros_(self.adapter_up.weight)
        nn.init.zeros_(self.adapter_up.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        return y + self.adapter_up(F.relu(self.adapter_down(y)))


def adapt_(model: "PretrainedModel", config: AdaptConfig) -> "PretrainedModel":
    """Adapt a model of ours in place; returns it.

    Afterwards only the adapters and `config.full` train, and nothing that was frozen before, such
    as momentum encoders, whose adapters follow. The model computes what it did, until they do.
    `save_pretrained` and `from_pretrained` keep the adapters.

    Raises:
        ImportError: peft is missing, for LoRA.
        ValueError: a model that is adapted already or a probe, targets or patterns that fit
            nothing, or a target that the model reads the weight of.
    """
    if config.kind is None:
        return model
    family = model.family.split("_")[0]
    targets = config.target_modules or TARGETS[family][config.kind]
    layers = {n: m for n, m in model.named_modules() if _fits(n, targets)}
    _check(model, targets, layers)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    online = {name for name, layer in layers.items() if layer.weight.requires_grad}
    full = _full(model, config, trained)
    if config.kind == "lora":
        _inject_lora_(model, config, targets)
    else:
        for name, layer in layers.items():
            _replace_layer_(model, name, Bottleneck(layer, config.width))
    model.adapted = Adapted(config, frozenset(trained))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(unadapted_name(name) in full or adapted_layer_of(name) in online)
    _copy_online_adapters_(model)
    return model


def merge_(model: "PretrainedModel") -> "PretrainedModel":
    """Add LoRA to the weights that it stands beside, in place; returns the model, plain again.

    Raises:
        ValueError: a bottleneck, which no weight can take in.
    """
    if model.adapted is None:
        return model
    if model.adapted.config.kind != "lora":
        raise ValueError(
            "model: expected one that LoRA adapts, got bottlenecks, which are no product of "
            "matrices; save_pretrained keeps them"
        )
    for name, layer in list(_adapted_layers(model)):
        layer.merge()
        _replace_layer_(model, name, layer.base_layer)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in model.adapted.trained)
    model.adapted = None
    del model.peft_config
    return model


def trainable_counts(model: "PretrainedModel") -> tuple[int, int]:
    """Count the parameters that train, and all but those that only follow in training."""
    follow = {id(tensor) for tensor in model.moved_in_training()}
    counted = [p for p in model.parameters() if id(p) not in follow]
    return sum(p.numel() for p in counted if p.requires_grad), sum(p.numel() for p in counted)


def trainable_share(model: "PretrainedModel") -> float:
    """The share of the parameters that train, momentum copies aside."""
    trained, every = trainable_counts(model)
    return trained / every


def unadapted_name(name: str) -> str | None:
    """The name of a parameter in the model before `adapt_`; None of an adapter's."""
    return None if adapted_layer_of(name) else name.replace(".base_layer.", ".")


def adapted_layer_of(name: str) -> str | None:
    """The adapted layer whose adapter a parameter belongs to; None of any other parameter."""
    found = re.match(r"(.*)\.(lora_[AB]\.default|adapter_(down|up))\.", name)
    return found and found[1]


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((n, m) for n, m in model.named_modules() if "base_layer" in m._modules)


def _replace_layer_(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _inject_lora_(model: nn.Module, config: AdaptConfig, targets: Targets) -> None:
    with require_extra("elip_models.models.peft.adapt"):
        from peft import LoraConfig, inject_adapter_in_model
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    inject_adapter_in_model(lora, model)


def _fits(name: str, targets: Targets) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _check(model: "PretrainedModel", targets: Targets, layers: dict[str, nn.Module]) -> None:
    if model.adapted is not None:
        raise ValueError("model: expected a plain one, got one that is adapted; merge_ it first")
    if getattr(model.config, "tuning", "full") != "full":
        raise ValueError("tuning: expected 'full' with adapters, whose gradient a probe has not")
    others = [name for name, layer in layers.items() if not isinstance(layer, nn.Linear)]
    if others or not layers:
        raise ValueError(
            f"target_modules: expected the names of linear layers in {type(model).__name__}, got "
            f"{targets!r}, which fits {others or 'nothing'}"
        )
    tied = Counter(id(weight) for m in model.modules() for weight in m._parameters.values())
    read = set(READ.get(model.family.split("_")[0], ()))
    read |= {name for name, layer in layers.items() if tied[id(layer.weight)] > 1}
    if read := sorted(read & layers.keys()):
        raise ValueError(
            f"target_modules: expected none of {read}, whose weight {type(model).__name__} reads "
            "elsewhere too; name it in full instead"
        )


def _full(model: "PretrainedModel", config: AdaptConfig, trained: set[str]) -> set[str]:
    """The names, after `adapt_`, of the parameters that train whole."""
    if config.full is None:
        return {*TEMPERATURES, *_new(model)} & trained
    unfitted = [p for p in config.full if not any(fnmatchcase(name, p) for name in trained)]
    if unfitted:
        raise ValueError(f"full: expected patterns of parameters that train, got {unfitted}")
    return {name for name in trained if any(fnmatchcase(name, p) for p in config.full)}


def _new(model: "PretrainedModel") -> set[str]:
    """The parameters of a downstream model that its pre-trained one does not give."""
    pretraining = getattr(model, "pretraining", None)
    if pretraining is None:
        return set()
    sizes = {f.name: getattr(model.config, f.name) for f in fields(pretraining.config_class)}
    with torch.device("meta"):
        begins_as = pretraining(pretraining.config_class(**sizes))
        given = model.from_pretraining(begins_as.state_dict(), model.config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    begun = {id(p) for name, p in parameters.items() if name in given}
    return {name for name, p in parameters.items() if id(p) not in begun}


@torch.no_grad()
def _copy_online_adapters_(model: nn.Module) -> None:
    """Give the adapters of momentum copies, `encoders_m`, the values of those that they follow."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        online = parameters.get(name.replace("_m.", ".", 1))
        if adapted_layer_of(name) and online is not None:
            parameter.copy_(online)
