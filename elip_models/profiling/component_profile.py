"""FLOPs of a training step by component of a model (ELIP, Figure 2b).

An op belongs to the innermost enclosing call in `CALLS`, or else to the heads. In the image tower,
our ops and ops without gradient choose and merge tokens and count as scoring. An op of backward
belongs to the component of the forward op that saved the tensors it reads. A multiply-add counts as
two FLOPs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from operator import attrgetter
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from elip_models.profiling.runner import in_mode
from elip_models.profiling.workload import Workload
from elip_models.strategies.strategy import Strategy

IMAGE, TEXT, FUSION = "image tower", "text tower", "fusion"
MOMENTUM, HEADS, SCORING = "momentum", "heads", "scoring"
PARTS = (IMAGE, SCORING, TEXT, FUSION, MOMENTUM, HEADS)
OF_MOMENTUM = {
    "encode_image": IMAGE,
    "_encode_images": MOMENTUM,
    "_momentum_features": MOMENTUM,
    "_update_momentum": MOMENTUM,
}
CALLS: dict[str, dict[str, str]] = {
    "clip": {
        "_encode_image": IMAGE,
        "encode_text": TEXT,
        "image_projection": HEADS,
        "text_projection": HEADS,
    },
    "albef": OF_MOMENTUM
    | {
        "encoders.encode_text": TEXT,
        "encoders.fuse": FUSION,
        "encoders.language_head": HEADS,
        "encoders_m.predict": MOMENTUM,
    },
    "blip": OF_MOMENTUM
    | {
        "encode_text": TEXT,
        "encode_text_reduced": TEXT,
        "dense_cls": SCORING,
        "fuse_reduced": FUSION,
        "decode": FUSION,
    },
    "meter": {
        "encode_image": IMAGE,
        "encode_text_reduced": TEXT,
        "dense_cls": SCORING,
        "fuse": FUSION,
    },
}
"""The component of each method or module of a model's step, by family."""


@dataclass(frozen=True)
class ComponentCosts:
    """FLOPs of one training step, forward and backward, by component."""

    model: str
    strategy: str
    batch_size: int
    flops: dict[str, float]  # of one image and its text


def profile_components(
    name: str, workload: Workload, strategies: Mapping[str, Strategy | None]
) -> list[ComponentCosts]:
    """Count each strategy's training step by component.

    A strategy of None is dense. A model that is not one of this library raises ValueError.
    """
    family = getattr(workload.model, "family", None)
    if family not in CALLS:
        raise ValueError(
            f"parts: expected a model of this library, one of {', '.join(CALLS)}, got "
            f"{type(workload.model).__name__}"
        )
    twin, size = workload.on_meta(), workload.batch_size
    costs = []
    for strategy_name, strategy in strategies.items():
        flops = {part: count / size for part, count in _count(twin, strategy).items()}
        costs.append(ComponentCosts(name, strategy_name, size, flops))
    return costs


def _count(twin: Workload, strategy: Strategy | None) -> dict[str, int]:
    """Run a training step with `strategy` on the meta device; return its FLOPs by component."""
    by_component = ComponentMode()
    with in_mode(twin, "training"), sdpa_kernel(SDPBackend.MATH):
        model = twin.reduced_by(strategy)
        for name, part in CALLS[model.family].items():
            _mark(model, name, part, by_component)
        with by_component, saved_tensors_hooks(by_component.pack, by_component.unpack):
            twin.train_step(lambda: twin.reducible.as_tensor(model(**twin.inputs)))
    return by_component.flops


def _mark(model: nn.Module, name: str, part: str, by_component: "ComponentMode") -> None:
    """Make `by_component` record when the model's method, or module, of that dotted name runs."""
    path, _, last = name.rpartition(".")
    owner = attrgetter(path)(model) if path else model
    if isinstance(getattr(owner, last), nn.Module):
        owner, last = getattr(owner, last), "forward"
    call = getattr(owner, last)

    @wraps(call)
    def marked(*args: Any, **kwargs: Any) -> Any:
        by_component.inside.append(part)
        try:
            return call(*args, **kwargs)
        finally:
            by_component.inside.pop()

    setattr(owner, last, marked)


class ComponentMode(TorchDispatchMode):
    """A dispatch mode that adds the FLOPs of each op to a component."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = [HEADS]  # components of the running marked calls, outermost first
        self.in_backward: str | None = None  # component of the running op of backward
        self.flops = dict.fromkeys(PARTS, 0)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops[self._part_of(func)] += formula(*args, **kwargs, out_val=out)
        return out

    def _part_of(self, func: Any) -> str:
        part = self.in_backward or self.inside[-1]
        without_gradient = self.in_backward is None and not torch.is_grad_enabled()
        is_scoring = part == IMAGE and (func.namespace == "elip" or without_gradient)
        return SCORING if is_scoring else part

    def pack(self, tensor: Tensor) -> tuple[str, Tensor]:
        """Store the component of a forward op with a tensor that it saves for backward."""
        return self.inside[-1], tensor

    def unpack(self, saved: tuple[str, Tensor]) -> Tensor:
        """Return a saved tensor; the op of backward that reads it belongs to its component."""
        self.in_backward, tensor = saved
        return tensor


def components_table(costs: Sequence[ComponentCosts]) -> Table:
    """Return a table of the components' shares of FLOPs."""
    table = Table("model", "strategy", title="Training step by component: shares of FLOPs")
    for part in (*PARTS, "GFLOPs"):
        table.add_column(part, justify="right")
    for row in costs:
        total = sum(row.flops.values())
        shares = (f"{row.flops[part] / total:.1%}" for part in PARTS)
        table.add_row(escape(row.model), escape(row.strategy), *shares, f"{total / 1e9:.3f}")
    return table
