"""Retrieval by late interaction: models with an embedding of each token (ColPali, ColQwen2).

Their head may put the image features into the prompt itself, so that the model inside gets no ids.
The head makes an embedding of every token: those of removed ones become zeros, as colpali-engine
pads. A caller of transformers drops them before it scores a page. sentence-transformers scores the
tokens of a mask, which removed ones leave.
"""

import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from elip_models.call_context import add, latest, take
from elip_models.engine.model_methods import keep_handles, owners_of_hooks, remove_hooks

RETRIEVAL = ("colpali", "colqwen2")
"""Their `config.model_type` in transformers."""
COLPALI_ENGINE, PREFIX = "colpali_engine", "Col"
"""The package with further models, and how the classes of those with many vectors begin."""


@dataclass
class RetrievalCall:
    """A forward pass of a head: its ids (B, N), and the tokens (B, N) bool that remain."""

    head: nn.Module
    ids: Tensor | None
    is_tuple: bool  # what the caller gets
    kept: Tensor | None = None

    def mark_removed(self, hidden: Tensor, kept: Tensor) -> Tensor:
        """Return hidden states (B, N, D) for the head, which normalises every token.

        Those beside `kept` (B, N) bool are ones, since zeros would have no finite gradient.
        """
        self.kept = kept
        return hidden.where(kept.unsqueeze(-1), 1)


class RetrievalHead:
    """The hooks of the head of a retrieval model."""

    def install(self, head: nn.Module) -> list[RemovableHandle]:
        """Register the hooks."""
        return [
            head.register_forward_pre_hook(self.begin, with_kwargs=True),
            head.register_forward_hook(self.end, with_kwargs=True, always_call=True),
        ]

    def begin(
        self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Note the ids, and ask for an output with names, unless an encoder around has done so."""
        if retrieval_call(head) is not None:
            return args, kwargs
        wanted = kwargs.get("return_dict")
        is_tuple = not (head.config.return_dict if wanted is None else wanted)
        call = RetrievalCall(head, args[0] if args else kwargs.get("input_ids"), is_tuple)
        add(call)
        return args, kwargs | {"return_dict": True}

    def end(self, head: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Set the embeddings of removed tokens to zero."""
        call = latest(RetrievalCall)
        if call is None or call.head is not head:
            return None
        take(RetrievalCall)
        if output is None:  # the head raised an error
            return None
        if isinstance(output, Tensor):
            return output if call.kept is None else output.where(call.kept.unsqueeze(-1), 0)
        if call.kept is not None:
            output["embeddings"] = output["embeddings"].where(call.kept.unsqueeze(-1), 0)
        return output.to_tuple() if call.is_tuple else output


class EncoderHead:
    """The hooks of a MultiVectorEncoder of sentence-transformers, which calls no hook of its model.

    It scores the tokens of a mask.
    """

    def begin(self, encoder: nn.Module, args: tuple[dict[str, Tensor]]) -> None:
        """Note the ids."""
        add(RetrievalCall(encoder, args[0].get("input_ids"), is_tuple=False))

    def end(self, encoder: nn.Module, args: Any, features: dict[str, Tensor] | None) -> Any:
        """Set the embeddings of removed tokens to zero, and take them out of the mask."""
        call = take(RetrievalCall)
        if call is None or call.kept is None or features is None:
            return None
        mask = features["attention_mask"].bool() & call.kept
        embeddings = features["token_embeddings"].where(call.kept.unsqueeze(-1), 0)
        return features | {"attention_mask": mask, "token_embeddings": embeddings}


def embeds_tokens(module: nn.Module) -> bool:
    """Return whether a module returns an embedding of each token of a prompt."""
    cls = type(module)
    if cls.__module__.partition(".")[0] == COLPALI_ENGINE:
        return cls.__name__.startswith(PREFIX)
    return getattr(getattr(module, "config", None), "model_type", None) in RETRIEVAL


def install_on_encoders(model: nn.Module) -> None:
    """Let encoders of sentence-transformers score the remaining tokens alone."""
    for encoder in _encoders(model):
        if not any(isinstance(owner, EncoderHead) for owner in owners_of_hooks(encoder)):
            head = EncoderHead()
            begin = encoder.register_forward_pre_hook(head.begin)
            end = encoder.register_forward_hook(head.end, always_call=True)
            keep_handles(encoder, head, begin, end)


def uninstall_from_encoders(model: nn.Module) -> None:
    """Undo `install_on_encoders`."""
    for encoder in _encoders(model):
        remove_hooks(encoder, EncoderHead)


def _encoders(model: nn.Module) -> list[nn.Module]:
    library = sys.modules.get("sentence_transformers")  # that of a model was imported
    cls = getattr(library, "MultiVectorEncoder", ())
    return [module for module in model.modules() if isinstance(module, cls)]


def retrieval_call(module: nn.Module) -> RetrievalCall | None:
    """Return the forward pass of the head that has this module, if it runs in this thread."""
    call = latest(RetrievalCall)
    return call if call is not None and module in call.head.modules() else None
