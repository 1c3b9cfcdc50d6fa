"""The queries and keys of one attention module of transformers, without a copy of its forward.

An attention module of transformers looks up the function that computes attention by a name in its
config. `watch` gives one module a config with another name. Its function hands queries, keys and
their scale to the listeners of the current thread, and computes attention as before.
"""

import sys
from collections.abc import Callable
from contextvars import ContextVar
from copy import copy
from functools import cache
from typing import Any

from torch import Tensor, nn

PREFIX = "elip_watched_"

Listener = Callable[[nn.Module, Tensor, Tensor, float | None], None]
LISTENERS: ContextVar[tuple[Listener, ...]] = ContextVar("LISTENERS", default=())


@cache
def register_functions() -> None:
    """Register the functions of watched modules, also for a model that another process pickled."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for own in ("eager", *list(ALL_ATTENTION_FUNCTIONS)):
        AttentionInterface.register(PREFIX + own, _watched)


def watch(attention: nn.Module) -> None:
    """Let listeners receive the queries and keys of an attention module."""
    register_functions()
    own = attention.config._attn_implementation or "eager"
    config = copy(attention.config)  # the layers share theirs
    config._attn_implementation_internal = PREFIX + own
    attention.config = config


def unwatch(attention: nn.Module, config: Any) -> None:
    """Give a watched module the config of its model again."""
    if is_watched(attention):
        attention.config = config


def is_watched(attention: nn.Module) -> bool:
    """Return whether `watch` changed the module."""
    name = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    return isinstance(name, str) and name.startswith(PREFIX)


def _watched(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Compute attention by the function that the module would use, after telling the listeners."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for listener in LISTENERS.get():
        listener(module, query, key, kwargs.get("scaling"))
    own = module.config._attn_implementation.removeprefix(PREFIX)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(own, eager)
    return function(module, query, key, *args, **kwargs)
