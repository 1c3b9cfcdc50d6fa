"""The parts of an image model that an adapter defines, and how a tower refers to its modules.

    x = x + residual1(out(attention(norm1(x))));  x = x + residual2(mlp(norm2(x)))

All blocks compute this function; the names of its parts differ. A `BlockNames` has these names;
a part is a module, or a parameter that scales each channel. `run` calls parts in order.

A reduced model has the objects that reduce it. If these held the model, only the garbage collector
could free its memory. So they refer to its modules by weak references (`ModuleReference`). A copy
or a pickle of such an object has strong ones, so that the modules are copied, until it is made.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn

from elip_models.towers.tower_data import QKV, Affine, BlockNames

NO_POSITION = -1
"""Of a token that is made of all dropped ones."""
Block = Callable[..., Tensor]
T = TypeVar("T")
PREFIX = "_to_"


class ModuleReference:
    """A class attribute that makes an attribute of its objects refer to a module.

    Reading it raises ReferenceError if the module is referred to weakly, and does not exist.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = PREFIX + name

    def __get__(self, holder: Any, owner: type | None = None) -> Any:
        value = getattr(holder, self.name)
        return value if isinstance(value, nn.Module | Sequence) else existing(value)

    def __set__(self, holder: Any, value: Any) -> None:
        setattr(holder, self.name, value)


class WeakModules(Sequence):
    """The items of a list of modules, or the modules that it had if the model has another list.

    Both are referred to weakly. Code may replace an item by a wrapper, or the list by another one.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.container = ref(modules) if isinstance(modules, nn.Module) else None
        self.references = [None if module is None else ref(module) for module in modules]

    @property
    def present(self) -> Any:
        """Return the list, or the modules' references if there is another one."""
        modules = None if self.container is None else self.container()
        return self.references if modules is None else modules

    def __getitem__(self, i: int) -> Any:
        item = self.present[i]
        return item if isinstance(item, nn.Module) else existing(item)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __len__(self) -> int:
        return len(self.present)


class TowerParts:
    """The attributes and methods of `Tower` that an adapter sets or overrides.

    Methods that raise NotImplementedError have no default. Tokens are (B, N, D), prefix tokens
    first. `qkv`, `weights`, `project` and `mlp` read the parameters of block i, so a caller outside
    the block's forward calls them inside `unsharded(i)`.

    model, blocks: the library's own modules; a block maps tokens to tokens.
    names: the names of the parts of a block.
    width, depth, num_heads, num_patches, image_size (H, W), mlp_ratio: sizes.
    scale: factor of the attention scores.
    num_frames: the frames of a clip that a video model reads. num_steps: the tubelets over time of
        one place; P = num_steps x rows x columns. Both are 1 for images.
    num_prefix_tokens: the number of tokens before the patches (CLS, registers); they always stay.
    has_cls: token 0 is CLS, whose attention scores; otherwise a text scores.
    pools: the model averages or attends to all patches after the last block.
    needs_grid: why its head reads every patch in its place, in one sentence, or None.
    absorbs_keys: a row is computed without a key projection of the tokens.
    is_rotary: blocks rotate queries and keys by the position of their patch.
    adds_bias: blocks add a bias to their attention for each pair of positions.
    positions: (B, N-p) the patch of each token, `NO_POSITION` for one without; None if the tokens
        are all patches in order. Only a tower that `has_positions` sets them.
    returns_tuple: a block returns a tuple, whose first item is the tokens.
    takes_padding: the model passes its blocks a mask, if images of a batch have other sizes.
    has_dynamic_size: the model takes images of other sizes, with other numbers of patches.
    size_advice: the remedy in an error about the image size.
    dense_methods: methods of the model that return the tokens of several blocks.
    unsupported_methods: methods of the model that would return wrong results on a reduced model.
    saved_config: the configuration that the library saves with the model, or None.
    is_part: the model has other parts than the tower and its head, such as a language model.
    whole_output: how to get all tokens from a model whose output is the tokens of the last block;
        None if its output is another.
    """

    model = ModuleReference()
    blocks = ModuleReference()
    names: BlockNames
    width: int
    depth: int
    num_heads: int
    num_patches: int
    image_size: tuple[int, int]
    mlp_ratio: float
    scale: float
    num_frames: int = 1
    num_steps: int = 1
    num_prefix_tokens: int = 1
    has_cls: bool = True
    pools: bool = False
    needs_grid: str | None = None
    absorbs_keys: bool = True
    is_rotary: bool = False
    adds_bias: bool = False
    positions: Tensor | None = None
    returns_tuple: bool = False
    takes_padding: bool = False
    has_dynamic_size: bool = False
    size_advice: str = "resize the images"
    dense_methods: tuple[str, ...] = ()
    unsupported_methods: tuple[str, ...] = ()
    saved_config: Any = None
    is_part: bool = False
    whole_output: str | None = None

    @staticmethod
    def accepts(model: nn.Module) -> bool:
        """Return whether this adapter handles the model, if its library has several adapters."""
        return True

    @staticmethod
    def refuses(model: nn.Module) -> str | None:
        """Return why the model cannot be a tower, in one sentence, or None if it can."""
        raise NotImplementedError

    @classmethod
    def refuses_blocks(cls, blocks: Iterable[nn.Module]) -> str | None:
        """Return why one of the blocks cannot be read, in one sentence, or None if all can."""
        reasons = (cls.refuses_block(block) for block in blocks)
        return next((reason for reason in reasons if reason is not None), None)

    @classmethod
    def refuses_block(cls, block: nn.Module) -> str | None:
        """Return why a block cannot be read, in one sentence, or None if it can."""
        return None

    @classmethod
    def refuses_attention(cls, attn: nn.Module) -> str | None:
        """Return why an attention cannot be read, in one sentence, or None if it can."""
        raise NotImplementedError

    def own_modules(self, model: nn.Module) -> list[nn.Module]:
        """Return the modules of the model around the tower, without those of models inside it."""
        return list(model.modules())

    @property
    def checkpointing(self) -> bool:
        """Return whether the model's forward, not its blocks, checkpoints their activations."""
        return False

    @property
    def trunk(self) -> nn.Module:
        """Return the module that has the blocks: the model, or a part of it."""
        return self.model

    @property
    def collector(self) -> nn.Module | None:
        """Return the module whose call `collects` hidden states or attentions, or None."""
        return None

    def collects(self, what: str, kwargs: dict[str, Any]) -> bool:
        """Return whether this call of `collector` returns all "hidden_states" or "attentions"."""
        raise NotImplementedError

    @property
    def embed_methods(self) -> list[tuple[nn.Module, str]]:
        """Return the owners and names of the methods that embed images, in call order."""
        raise NotImplementedError

    def image_stats(self) -> tuple[Sequence[float], Sequence[float]] | None:
        """Return the mean and standard deviation that normalise images, or None if unknown."""
        return None

    def refuses_dropping(self) -> str | None:
        """Return why no patch may be dropped without merging, in one sentence, or None."""
        return None

    def refuses_resizing(self) -> str | None:
        """Return why the image size cannot change, in one sentence, or None if it can."""
        return None

    def patchify(self, images: Tensor) -> Tensor:
        """Return what `embed_methods` makes of images (B, 3, h, w), with interpolated positions."""
        raise NotImplementedError

    def enter(self, tokens: Tensor) -> Tensor:
        """Run the modules between `embed_methods` and block 0; by default there are none."""
        return tokens

    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens before block 0 of images (B, 3, H, W)."""
        raise NotImplementedError

    def rotated(self, i: int, heads: Tensor) -> Tensor:
        """Rotate block i's queries or keys (B, H, N, d) by the position of each token."""
        return heads

    def qkv(self, i: int, tokens: Tensor) -> QKV:
        """Return block i's queries, keys and values (B, H, N, d) of tokens before its norm."""
        attn, heads = self._attention(i), self.num_heads
        projected = self.projected(attn, getattr(self.blocks[i], self.names.norm1)(tokens))
        if isinstance(projected, Tensor):
            parts = projected.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            # an index is one node of ONNX, a part of unbind two
            exports = torch.compiler.is_exporting()
            q, k, v = [parts[j] for j in range(3)] if exports else parts.unbind()
        else:
            q, k, v = (y.unflatten(2, (heads, -1)).transpose(1, 2) for y in projected)
        q_norm, k_norm = self._head_norms(attn)
        return self.rotated(i, normed(q_norm, q)), self.rotated(i, normed(k_norm, k)), v

    def projected(self, attn: nn.Module, x: Tensor) -> Tensor | list[Tensor]:
        """Return queries, keys and values (B, N, D) of `x`, after the norm; joint if one layer."""
        layers = self._layers(attn)
        return layers[0](x) if len(layers) == 1 else [layer(x) for layer in layers]

    def attention_dropout(self, i: int) -> float:
        """Return the current dropout rate of block i's attention weights."""
        attn = self._attention(i)
        if not attn.training:
            return 0.0
        rates = (part(attn, name) for name in self.names.dropout)
        rate = next((rate for rate in rates if rate is not None), 0.0)
        return rate.p if isinstance(rate, nn.Dropout) else rate

    def project(self, i: int, attended: Tensor) -> Tensor:
        """Return what block i adds to the tokens, from its attention's output (B, N, D)."""
        out = run(self._attention(i), self.names.out, attended)
        return run(self.blocks[i], self.names.after[0], out)

    def mlp(self, i: int, tokens: Tensor) -> Tensor:
        """Run block i's MLP sublayer, residual included."""
        names = self.names
        return tokens + run(self.blocks[i], (names.norm2, *names.mlp, *names.after[1]), tokens)

    def finish(self, tokens: Tensor) -> Tensor:
        """Run the final norm, before pooling."""
        raise NotImplementedError


def part(module: nn.Module, name: str) -> nn.Module | Tensor | float | None:
    """Return the inner module, parameter or number `name`, with dots; None if there is none."""
    inner = module
    for attribute in name.split("."):
        inner = getattr(inner, attribute, None)
    return inner


def run(module: nn.Module, names: Iterable[str], x: Tensor) -> Tensor:
    """Run parts of a module in order: call modules, multiply by the others, skip what is absent."""
    for name in names:
        inner = part(module, name) if "." in name else getattr(module, name, None)
        if isinstance(inner, nn.Module):
            x = inner(x)
        elif inner is not None:
            x = inner * x
    return x


def normed(norm: nn.Module | None, heads: Tensor) -> Tensor:
    """Return queries or keys (B, H, N, d) after the norm of each head, if there is one."""
    return heads if norm is None else norm(heads)


def is_hooked(module: nn.Module) -> bool:
    """Return whether forward hooks, or a replaced forward, see or change the module's calls."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


def linear_map(layer: nn.Module) -> Affine | None:
    """Return the map of an nn.Linear, or None if it has no readable weight or is another layer."""
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        return None
    weight = layer.weight
    is_quantised = hasattr(weight, "__tensor_flatten__")  # the protocol of wrapper subclasses
    return None if is_quantised or is_hooked(layer) else Affine(weight, layer.bias)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module that peft's `modules_to_save` wrapper calls; any other module as it is."""
    if not is_peft(module, "peft.utils.other", "ModulesToSaveWrapper") or is_hooked(module):
        return module
    adapters, trained = module.active_adapters, module.modules_to_save
    if module.disable_adapters or not adapters or any(a not in trained for a in adapters):
        return module.original_module
    return trained[adapters[0]]


def is_peft(module: nn.Module, file: str, name: str) -> bool:
    """Return whether the module is of this class of peft, which is optional."""
    return type(module).__name__ == name and type(module).__module__ == file


def existing(reference: "ref[nn.Module] | None") -> nn.Module:
    """Return the module of a weak reference; raise ReferenceError if it does not exist any more."""
    module = None if reference is None else reference()
    if module is None:
        raise ReferenceError(
            "model: expected the reduced model that this part belongs to, got one that was "
            "deleted; keep a reference to it, or unreduce_ it before its part is taken or copied"
        )
    return module


def is_gone(holder: Any, name: str) -> bool:
    """Return whether an attribute refers to a module that does not exist any more."""
    return _strong(vars(holder)[PREFIX + name]) is None


def weakly(holder: T) -> T:
    """Return a copy whose references to modules are weak."""
    return _changed(holder, _weak)


def strongly(holder: T) -> T:
    """Return a copy whose references to modules are strong."""
    return _changed(holder, _strong)


def _changed(holder: T, change: Callable[[Any], Any]) -> T:
    changed = object.__new__(type(holder))
    for name, value in vars(holder).items():
        vars(changed)[name] = change(value) if name.startswith(PREFIX) else value
    return changed


def _weak(value: Any) -> Any:
    if isinstance(value, nn.ModuleList | nn.Sequential | tuple | list):
        return WeakModules(value)
    return ref(value) if isinstance(value, nn.Module) else value


def _strong(value: Any) -> Any:
    if isinstance(value, WeakModules):
        present = value.present
        return present if isinstance(present, nn.Module) else tuple(map(_strong, present))
    return value() if isinstance(value, ref) else value
