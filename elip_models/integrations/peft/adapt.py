"""Parameter-efficient fine-tuning: a few new parameters train, the pre-trained weights do not.

    lora      y = W x + b + (alpha / r) B A x      in the projections of attention, by peft
    adapter   y = W x + b;  y + U relu(D y)        a bottleneck after each MLP

`adapt_` adds either kind to any of our models, for pre-training and downstream tasks. The
bottleneck is implemented here: peft has none, and the package `adapters` requires transformers 4.

Momentum encoders get adapters too. They start equal to the online adapters and follow them by the
same moving average as all other parameters. For LoRA, A and B are averaged separately: the momentum
encoder adds the product of two averages, not the average of the products.
Sources: LoRA (Hu et al., 2022); adapters (Houlsby et al., 2019; Pfeiffer et al., 2021).
"""

import re
from collections import Counter
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_models.integrations.peft.adapt_config import AdaptConfig
from elip_models.integrations.peft.adaptable_model import AdaptableModel, Adapted
from elip_models.validation import check, require_extra

Model = TypeVar("Model", bound=AdaptableModel)
Targets = str | tuple[str, ...]
WITH_BERT: dict[str, Targets] = {
    "lora": ("attn.qkv", "query", "key", "value"),
    "adapter": r".*(blocks\.\d+\.mlp\.fc2|layers\.\d+\.output\.dense)",
}
TARGETS: dict[str, dict[str, Targets]] = {
    "clip": {"lora": ("attn.qkv", "q_proj", "k_proj", "v_proj"), "adapter": ("mlp.fc2",)},
    **dict.fromkeys(("albef", "blip", "meter"), WITH_BERT),
}
"""Family -> kind -> default targets: queries, keys and values of all attention, or the last layer
of each MLP. A downstream model uses the entry of its pre-trained family."""
TEMPERATURES = ("temperature", "logit_scale", "logit_bias")
READ_AS_WEIGHTS = {"clip": ("image_projection", "text_projection")}
"""Family -> layers whose weight the model also reads directly, to map features back."""


class Bottleneck(nn.Module):
    """A linear layer followed by a residual bottleneck, which is zero when it is created."""

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
        """Apply the layer to x (..., in), then add the bottleneck of its output (..., out)."""
        y = self.base_layer(x)
        return y + self.adapter_up(F.relu(self.adapter_down(y)))


def adapt_(model: Model, config: AdaptConfig) -> Model:
    """Add adapters to one of our models in place, and freeze the rest.

    The output does not change until the adapters are trained. Parameters that were frozen before,
    such as momentum encoders, stay frozen. `save_pretrained` and `from_pretrained` keep adapters.

    Example::

        adapt_(model, AdaptConfig(kind="lora", r=8))

    Args:
        model: a plain model, such as one of `create_model`.
        config: the kind of adapter and where it goes. With `kind=None` nothing changes.

    Returns:
        The same model. Only the adapters and the parameters in `config.full` train.

    Raises:
        ImportError: peft is missing, which LoRA needs.
        TypeError: not one of our models, or not an `AdaptConfig`.
        ValueError: the model has adapters or is a linear probe; the targets or patterns match
            nothing; or the model reads the weight of a target directly.
    """
    if not isinstance(model, AdaptableModel):
        raise TypeError(
            f"model: expected one as of `create_model`, got {type(model).__name__}; adapt models "
            "of other libraries with peft"
        )
    check("config", config, AdaptConfig)
    if config.kind is None:
        return model
    family = model.family.split("_")[0]
    targets = config.target_modules or TARGETS[family][config.kind]
    layers = {n: m for n, m in model.named_modules() if _matches(n, targets)}
    _check_targets(model, targets, layers)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    online = {name for name, layer in layers.items() if layer.weight.requires_grad}
    full = _fully_trained(model, config, trained)
    if config.kind == "lora":
        with require_extra("elip_models.integrations.peft.adapt"):
            from peft import LoraConfig, inject_adapter_in_model
        lora = LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
        )
        inject_adapter_in_model(lora, model)
    else:
        for name, layer in layers.items():
            model.set_submodule(name, Bottleneck(layer, config.width))
    model.adapted = Adapted(config, frozenset(trained))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(unadapted_name(name) in full or adapted_layer_of(name) in online)
    _copy_online_adapters_(model)
    return model


def merge_(model: Model) -> Model:
    """Add LoRA's matrices to the weights in place; returns the model, which is plain again.

    Raises:
        ValueError: the model has bottlenecks, which cannot be merged into a weight.
    """
    if model.adapted is None:
        return model
    if model.adapted.config.kind != "lora":
        raise ValueError(
            "model: expected LoRA adapters, got bottlenecks, which are not linear and cannot be "
            "merged; save_pretrained keeps them"
        )
    adapted = {n: m for n, m in model.named_modules() if hasattr(m, "base_layer")}
    for name, layer in adapted.items():
        layer.merge()
        model.set_submodule(name, layer.base_layer)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in model.adapted.trained)
    model.adapted = None
    del model.peft_config
    return model


def trainable_counts(model: AdaptableModel) -> tuple[int, int]:
    """Return the numbers of trainable and of all parameters, without momentum copies."""
    follow = {id(tensor) for tensor in model.updated_by_forward()}
    counted = [p for p in model.parameters() if id(p) not in follow]
    return sum(p.numel() for p in counted if p.requires_grad), sum(p.numel() for p in counted)


def trainable_share(model: AdaptableModel) -> float:
    """Return the share of the parameters that train, in [0, 1], without momentum copies."""
    trained, every = trainable_counts(model)
    return trained / every


def unadapted_name(name: str) -> str | None:
    """Return the name that a parameter had before `adapt_`, or None for an adapter's parameter."""
    return None if adapted_layer_of(name) else name.replace(".base_layer.", ".")


def adapted_layer_of(name: str) -> str | None:
    """Return the layer that an adapter's parameter belongs to, or None for other parameters."""
    match = re.match(r"(.*)\.(lora_[AB]\.default|adapter_(down|up))\.", name)
    return match and match[1]


def _matches(name: str, targets: Targets) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _check_targets(model: AdaptableModel, targets: Targets, layers: dict[str, nn.Module]) -> None:
    if model.adapted is not None:
        raise ValueError("model: expected a plain model, got one with adapters; merge_ it first")
    if getattr(model.config, "tuning", "full") != "full":
        raise ValueError(
            f"tuning: expected 'full' with adapters, got {model.config.tuning!r}, which gives "
            "them no gradient"
        )
    others = [name for name, layer in layers.items() if not isinstance(layer, nn.Linear)]
    if others or not layers:
        raise ValueError(
            f"target_modules: expected the names of linear layers in {type(model).__name__}, got "
            f"{targets!r}, which matches {others or 'nothing'}"
        )
    tied = Counter(id(weight) for m in model.modules() for weight in m.parameters(recurse=False))
    read = set(READ_AS_WEIGHTS.get(model.family.split("_")[0], ()))
    read |= {name for name, layer in layers.items() if tied[id(layer.weight)] > 1}
    if read := sorted(read & layers.keys()):
        raise ValueError(
            f"target_modules: expected none of {read}, whose weight {type(model).__name__} also "
            "uses elsewhere; name it in `full` instead"
        )


def _fully_trained(model: AdaptableModel, config: AdaptConfig, trained: set[str]) -> set[str]:
    """Return the names, before `adapt_`, of the parameters that train themselves."""
    if config.full is None:
        return {*TEMPERATURES, *model.new_parameters()} & trained
    unmatched = [p for p in config.full if not any(fnmatchcase(name, p) for name in trained)]
    if unmatched:
        raise ValueError(f"full: expected patterns of trainable parameters, got {unmatched}")
    return {name for name in trained if any(fnmatchcase(name, p) for p in config.full)}


@torch.no_grad()
def _copy_online_adapters_(model: nn.Module) -> None:
    """Give the adapters of momentum copies, `encoders_m`, the values of the online adapters."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        online = parameters.get(name.replace("_m.", ".", 1))
        if adapted_layer_of(name) and online is not None:
            parameter.copy_(online)
