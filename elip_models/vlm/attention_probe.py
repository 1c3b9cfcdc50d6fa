"""The queries and keys of one attention module of transformers, without a copy of its forward.

An attention module of transformers looks up the function that computes attention by a name in its
config. `watch` gives one module a view of its config with another name. The function of that name
passes queries, keys and their scale to the module's watcher, and computes attention as before.
"""

import sys
from functools import cache
from typing import Any

from torch import Tensor, nn

PREFIX = "elip_watched_"


def implementation_of(config: Any) -> str:
    """Return the implementation of attention; the model's `set_attn_implementation` changes it."""
    return config._attn_implementation or "eager"  # there is no public name to read it by


class WatchedConfig:
    """The config of a watched module: `own`, with another name of its implementation."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of `own`."""
        if name == "own" or name.startswith("__"):  # a copy that has no attributes yet
            raise AttributeError(name)
        if name == "_attn_implementation":  # which attention modules read
            return PREFIX + implementation_of(self.own)
        return getattr(self.own, name)


class Watcher:
    """The base class of objects that receive queries and keys."""

    def receive(
        self, query: Tensor, key: Tensor, scale: float | None, softcap: float | None
    ) -> None:
        """Receive queries (B, H, N, d), keys (B, G, K, d), the factor of their products, and c.

        Scores s become c * tanh(s / c), unless c is None.
        """
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or pickled watcher, whose module needs the registered functions."""
        register_functions()
        vars(self).update(state)


@cache
def register_functions() -> None:
    """Register a function for each of those that compute attention in transformers."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for own in ("eager", *list(ALL_ATTENTION_FUNCTIONS)):
        AttentionInterface.register(PREFIX + own, _watched)


def watch(attention: nn.Module, watcher: Watcher) -> None:
    """Pass the queries and keys of an attention module to a watcher, in each of its calls."""
    register_functions()
    attention.config, attention.watcher = WatchedConfig(attention.config), watcher


def unwatch(module: nn.Module) -> None:
    """Undo `watch`, if the module is watched."""
    if is_watched(module):
        module.config = module.config.own
        del module.watcher


def is_watched(attention: nn.Module) -> bool:
    """Return whether `watch` changed the module."""
    return isinstance(getattr(attention, "watcher", None), Watcher)


def _watched(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Compute attention by the function that the module used before."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    settings = (kwargs.get("scaling"), kwargs.get("softcap"))
    module.watcher.receive(query.detach(), key.detach(), *settings)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    implementation = implementation_of(module.config.own)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    return function(module, query, key, *args, **kwargs)
