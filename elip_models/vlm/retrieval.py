"""Retrieval by late interaction: models with an embedding of each token (ColPali, ColQwen2).

Their head may put the image features into the prompt itself, so that the model inside gets no ids.
It makes an embedding of every token: those of removed tokens become zeros, as those of padding.
"""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from elip_models.reduction.model_patches import remove_hooks
from elip_models.vlm.families import Multimodal

RETRIEVAL = ("colpali", "colqwen2")


@dataclass
class RetrievalCall:
    """The ids (B, N) of a forward pass of the head, and the tokens (B, N) bool that remain."""

    ids: Tensor | None
    kept: Tensor | None = None


CURRENT: ContextVar[RetrievalCall | None] = ContextVar("CURRENT", default=None)


class RetrievalHead:
    """The hooks of the head of a retrieval model."""

    def install(self, multimodal: Multimodal) -> None:
        """Register the hooks if the model is one for retrieval."""
        head = multimodal.head
        if head is None or head.config.model_type not in RETRIEVAL:
            return
        head.register_forward_pre_hook(self.begin, with_kwargs=True)
        head.register_forward_hook(self.end, with_kwargs=True, always_call=True)

    @staticmethod
    def uninstall(multimodal: Multimodal) -> None:
        """Undo `install`."""
        if multimodal.head is not None:
            remove_hooks(multimodal.head, RetrievalHead)

    def begin(self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the ids."""
        CURRENT.set(RetrievalCall(args[0] if args else kwargs.get("input_ids")))

    def end(self, head: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Set the embeddings of removed tokens to zero."""
        call = CURRENT.get()
        CURRENT.set(None)
        if call is None or call.kept is None or output is None:
            return None
        output["embeddings"] = output["embeddings"].where(call.kept.unsqueeze(-1), 0)
        return output


def ids_of_retrieval() -> Tensor | None:
    """Return the ids (B, N) of the retrieval model that runs in this thread, or None."""
    call = CURRENT.get()
    return None if call is None else call.ids


def mark_removed(hidden: Tensor, kept: Tensor) -> Tensor:
    """Return hidden states (B, N, D) for the head of the retrieval model that runs, if one does.

    The head normalises every token. Those beside `kept` (B, N) bool are ones, since zeros would
    have no finite gradient.
    """
    if (call := CURRENT.get()) is None:
        return hidden
    call.kept = kept
    return hidden.where(kept.unsqueeze(-1), 1)
