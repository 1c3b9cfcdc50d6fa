"""Parts of the pre-training objectives that the cross-modal models share.

ITC   soft targets y = alpha softmax(s_m) + (1 - alpha) I over [batch | queue]    ALBEF, Eq. 6
ITM   negatives drawn by the softmax of the batch's similarities, never the pair itself
MLM   15% of the tokens: 80% [MASK], 10% another, 10% as they were                BERT
LM    each token from those before it, with label smoothing                        BLIP
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # of cross entropy


def soft_contrastive_loss(
    similarities: tuple[Tensor, Tensor], momentum: tuple[Tensor, Tensor], alpha: float
) -> Tensor:
    """ITC with momentum distillation, the mean of both directions, in fp32.

    Args:
        similarities: image-to-text and text-to-image (B, B + Q), over the temperature.
        momentum: the same of the momentum encoders; without gradient.
        alpha: weight of the momentum targets.
    """
    losses = []
    for online, teacher in zip(similarities, momentum, strict=True):
        identity = torch.eye(*online.shape, device=online.device)
        targets = alpha * teacher.float().softmax(1) + (1 - alpha) * identity
        losses.append(-(online.float().log_softmax(1) * targets).sum(1).mean())
    return (losses[0] + losses[1]) / 2


@torch.no_grad()
def hard_negatives(similarities: Tensor, epsilon: float = 0.0) -> Tensor:
    """For each row another column, drawn by the row's softmax.

    Args:
        similarities: (B, B), over the temperature; the diagonal are the pairs.
        epsilon: added to each weight, so that no row is all zero.

    Returns:
        (B,) int64. One image has no negative but itself.
    """
    weights = similarities.float().softmax(1) + epsilon
    weights = weights.clone().fill_diagonal_(0)
    lonely = weights.sum(1, keepdim=True) <= 0  # all of the mass is on the pair itself
    weights = torch.where(lonely, 1.0 - torch.eye(*weights.shape, device=weights.device), weights)
    if len(weights) == 1:
        return torch.zeros(1, dtype=torch.long, device=weights.device)
    return torch.multinomial(weights, 1)[:, 0]


def mask_tokens(
    input_ids: Tensor,
    *,
    mask_token_id: int,
    special_token_ids: tuple[int, ...],
    vocab_size: int,
    probability: float = 0.15,
) -> tuple[Tensor, Tensor]:
    """Hide tokens for masked language modelling.

    Returns:
        masked ids and labels, (B, L) each; labels are -100 where nothing is to be predicted.
    """
    drawn = torch.rand(2, *input_ids.shape, device=input_ids.device)
    special = torch.zeros_like(input_ids, dtype=torch.bool)
    for token in special_token_ids:
        special |= input_ids == token
    chosen = (drawn[0] < probability) & ~special
    labels = input_ids.masked_fill(~chosen, IGNORED)
    random = torch.randint_like(input_ids, vocab_size)
    replaced = torch.where(drawn[1] < 0.8, mask_token_id, input_ids)
    replaced = torch.where((drawn[1] >= 0.8) & (drawn[1] < 0.9), random, replaced)
    return torch.where(chosen, replaced, input_ids), labels


def distilled_language_loss(
    logits: Tensor, labels: Tensor, teacher: Tensor | None, alpha: float
) -> Tensor:
    """(1 - alpha) CE + alpha soft CE against the teacher, means over the labelled positions.

    Where no position is labelled it is 0.

    Args:
        logits, teacher: (B, L, V); the teacher's without gradient, or None.
        labels: (B, L), -100 = ignored.
        alpha: weight of the teacher.
    """
    logits, labelled = logits.float(), labels != IGNORED
    count = labelled.sum().clamp_min(1)
    loss = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    if teacher is None or alpha == 0:
        return loss / count
    soft = -(logits.log_softmax(-1) * teacher.float().softmax(-1)).sum(-1)
    return ((1 - alpha) * loss + alpha * (soft * labelled).sum()) / count


def language_loss(logits: Tensor, input_ids: Tensor, mask: Tensor, smoothing: float) -> Tensor:
    """LM: cross entropy of each next token, the mean over the real ones, in fp32.

    Where no real token follows another it is 0.

    Args:
        logits: (B, L, V), of position i for token i + 1.
        input_ids, mask: (B, L), 1 = real.
        smoothing: of the labels.
    """
    labels = input_ids.masked_fill(mask == 0, IGNORED)[:, 1:]
    loss = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=smoothing,
    )
    return loss / (labels != IGNORED).sum().clamp_min(1)
