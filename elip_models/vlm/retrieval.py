"""Retrieval by late interaction: models with an embedding of each token (ColPali, ColQwen2).

Their head may put the image features into the prompt itself, so that the model inside gets no ids.
The head makes an embedding of every token: those of removed ones become zeros, which a caller drops
before it scores a page, since their similarity with a query is 0.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from elip_models.call_context import add, latest, take

RETRIEVAL = ("colpali", "colqwen2")


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
        """Register the hooks if the head is one for retrieval."""
        if head.config.model_type not in RETRIEVAL:
            return []
        return [
            head.register_forward_pre_hook(self.begin, with_kwargs=True),
            head.register_forward_hook(self.end, with_kwargs=True, always_call=True),
        ]

    def begin(
        self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Note the ids, and ask for an output with names."""
        wanted = kwargs.get("return_dict")
        is_tuple = not (head.config.return_dict if wanted is None else wanted)
        call = RetrievalCall(head, args[0] if args else kwargs.get("input_ids"), is_tuple)
        add(call)
        return args, kwargs | {"return_dict": True}

    def end(self, head: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Set the embeddings of removed tokens to zero."""
        call = take(RetrievalCall)
        if call is None or output is None:  # the head raised an error
            return None
        if call.kept is not None:
            output["embeddings"] = output["embeddings"].where(call.kept.unsqueeze(-1), 0)
        return output.to_tuple() if call.is_tuple else output


def retrieval_call(module: nn.Module) -> RetrievalCall | None:
    """Return the forward pass of the head that has this module, if it runs in this thread."""
    call = latest(RetrievalCall)
    return call if call is not None and module in call.head.modules() else None
