"""What a model of a downstream task returns in training, where its loss has one part."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class TaskOutput:
    """loss: scalar. logits: of the classes (B, num_classes), or of each next token (.., L, V)."""

    loss: Tensor
    logits: Tensor
