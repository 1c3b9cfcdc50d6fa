"""What was selected in the first step of `generate` without a cache.

Its further steps read the whole prompt again, with generated tokens, and keep the same image
tokens. `generate` encodes the images once: the selections belong to what it encoded.
"""

from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

NAME = "elip_selections"


@dataclass
class Selections:
    """The selections of one generation.

    hooks: those of the model.
    prompt: (B, N), the ids of the first step.
    length: how many tokens the last step read.
    made: what was selected, in the order of the selections.
    """

    hooks: object
    prompt: Tensor
    length: int
    made: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, hooks: object, ids: Tensor | None, encoded: dict[str, Any] | None) -> Self | None:
        """Return the selections of the generation that a forward pass without a cache is part of.

        They are empty in its first step, and None if the pass is no step of a generation.
        """
        output = next((part for part in (encoded or {}).values() if part is not None), None)
        if ids is None or output is None or torch.is_grad_enabled():
            return None
        before = getattr(output, NAME, None)
        if before is None or not before.is_before(hooks, ids):
            before = cls(hooks, ids, ids.shape[1])
            setattr(output, NAME, before)
        before.length = ids.shape[1]
        return before

    def is_before(self, hooks: object, ids: Tensor) -> bool:
        """Return whether ids (B, N) are those of the last step, and a token."""
        prompt, length = self.prompt, self.length
        is_longer = hooks is self.hooks and ids.shape == (len(prompt), length + 1)
        return is_longer and torch.equal(ids[:, : prompt.shape[1]], prompt)
