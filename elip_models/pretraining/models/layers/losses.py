"""Losses of pre-training, and the random choices of a step.

ITC   cross entropy of the similarities s f_image f_text^T, by rows and by columns    CLIP
      binary: -log sigmoid(+-(s f_i f_t + b)) for each image with each text           SigLIP
      soft targets y = alpha softmax(s_m) + (1 - alpha) I over [batch | queue]        ALBEF, Eq. 6
ITM   negatives drawn by the softmax of the batch's similarities, without the pair itself
MLM   15% of the tokens or words: 80% [MASK], 10% a random token, 10% unchanged       BERT
LM    each token from the earlier ones, with label smoothing                          BLIP
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_kernels.autocast import no_autocast
from elip_models.pretraining.models.layers.distributed import (
    Gather,
    all_gather,
    labelled_count,
    rank_of,
)

IGNORED = -100  # label that cross entropy ignores


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    scale: Tensor,
    *,
    gather: Gather = "local",
    image_ids: Tensor | None = None,
) -> Tensor:
    """Return the symmetric cross entropy over the batch, a scalar in fp32.

    Row i of both normalised features (B, E) is one pair; `scale` is the inverse temperature.
    gather='local' takes negatives from this rank, 'global' from all ranks: then the mean over
    ranks, and its gradient, equal one process with the whole batch. image_ids (B,) are equal where
    two pairs show the same image, whose texts are equally weighted positives.
    """
    B = image_features.shape[0]
    images, texts = image_features.float(), text_features.float()
    all_images, all_texts = all_gather(images, gather), all_gather(texts, gather)
    labels = torch.arange(B, device=images.device) + rank_of(gather) * B
    if image_ids is not None:
        same = (image_ids[:, None] == all_gather(image_ids, gather)).float()
        labels = same / same.sum(1, keepdim=True)
    with no_autocast(images):
        image_to_text = F.cross_entropy(scale.float() * images @ all_texts.T, labels)
        text_to_image = F.cross_entropy(scale.float() * texts @ all_images.T, labels)
    return (image_to_text + text_to_image) / 2


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    gather: Gather = "local",
) -> Tensor:
    """Return SigLIP's loss, a scalar in fp32: binary over all B^2 pairs, summed, divided by B.

    Only texts are gathered. For the arguments, see `contrastive_loss`; `bias` is a scalar offset.
    """
    B = image_features.shape[0]
    images, texts = image_features.float(), all_gather(text_features.float(), gather)
    with no_autocast(images):
        logits = scale.float() * images @ texts.T + bias.float()
    columns = torch.arange(len(texts), device=images.device)
    rows = torch.arange(B, device=images.device) + rank_of(gather) * B
    signs = torch.where(rows[:, None] == columns, 1.0, -1.0)
    return -F.logsigmoid(signs * logits).sum() / B


def soft_contrastive_loss(
    similarities: tuple[Tensor, Tensor],
    momentum: tuple[Tensor, Tensor],
    alpha: Tensor | float,
    first: int = 0,
    positives: Tensor | None = None,
) -> Tensor:
    """Return ITC with momentum distillation, the mean of both directions, in fp32.

    `similarities` are image-to-text and text-to-image (B, C), divided by the temperature;
    `momentum` are those of the momentum encoders. Row i is the pair of column first + i, its
    positive unless `positives` (B, C) bool has all positive columns.
    """
    losses = []
    for online, teacher in zip(similarities, momentum, strict=True):
        log_probability = online.float().log_softmax(1)
        soft = (log_probability * teacher.float().softmax(1)).sum(1)
        if positives is None:
            own = log_probability.diagonal(first)
        else:
            own = (log_probability * positives).sum(1) / positives.sum(1)
        losses.append(-(alpha * soft + (1 - alpha) * own).mean())
    return (losses[0] + losses[1]) / 2


@torch.no_grad()
def hard_negatives(
    similarities: Tensor,
    epsilon: float = 0.0,
    first: int = 0,
    positives: Tensor | None = None,
) -> Tensor:
    """Draw for each row of (B, C) a column of another pair, by softmax + epsilon -> (B,) int64.

    Row i is the pair of column first + i. `positives` (B, C) bool are columns to exclude too,
    unless a row has no other column. For a single column, the result is the pair itself.
    """
    B, C = similarities.shape
    if C == 1:
        return torch.zeros(B, dtype=torch.long, device=similarities.device)
    others = torch.ones_like(similarities, dtype=torch.float32)
    others.diagonal(first).zero_()
    if positives is not None:
        negatives = others * ~positives
        others = torch.where(negatives.any(1, keepdim=True), negatives, others)
    weights = (similarities.float().softmax(1) + epsilon) * others
    degenerate = ~(weights.sum(1, keepdim=True) > 0)  # all weight on the pair itself, or NaN
    return torch.multinomial(torch.where(degenerate, others, weights), 1)[:, 0]


@torch.no_grad()
def mask_tokens(
    input_ids: Tensor,
    *,
    mask_token_id: int,
    special_token_ids: tuple[int, ...],
    vocab_size: int,
    probability: float,
    continues: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mask tokens for masked language modelling: 80% [MASK], 10% a random token, 10% unchanged.

    Args:
        input_ids: (B, L).
        mask_token_id: id of [MASK].
        special_token_ids: never chosen.
        vocab_size: range of random tokens.
        probability: of choosing a token, or a word.
        continues: (V,) bool, tokens that continue a word, to choose whole words; or None.

    Returns:
        Masked ids and labels, (B, L) each; labels are -100 for tokens that are not chosen.
    """
    chance, kind = torch.rand(2, *input_ids.shape, device=input_ids.device)
    special = torch.zeros_like(input_ids, dtype=torch.bool)
    for token in special_token_ids:
        special |= input_ids == token
    if continues is not None:
        word = (~continues[input_ids]).cumsum(1).sub(1).clamp(min=0)
        chance = chance.gather(1, word)
    chosen = (chance < probability) & ~special
    random = torch.randint_like(input_ids, vocab_size)
    replaced = torch.where(kind < 0.8, mask_token_id, torch.where(kind < 0.9, random, input_ids))
    return torch.where(chosen, replaced, input_ids), input_ids.masked_fill(~chosen, IGNORED)


def distilled_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | None = None,
    alpha: Tensor | float = 0.0,
    smoothing: float = 0.0,
) -> Tensor:
    """Return (1 - alpha) CE + alpha soft CE against the teacher (.., V), for each label (..).

    The loss is fp32, or fp64 for fp64 logits (.., V), and 0 for the label -100.
    """
    logits = at_least_fp32(logits)
    options = {"ignore_index": IGNORED, "reduction": "none", "label_smoothing": smoothing}
    hard = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), **options).view_as(labels)
    if teacher is None:
        return hard
    soft = -(logits.log_softmax(-1) * at_least_fp32(teacher).softmax(-1)).sum(-1)
    return (1 - alpha) * hard + alpha * soft * (labels != IGNORED)


def language_loss(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | None = None,
    alpha: Tensor | float = 0.0,
    smoothing: float = 0.0,
    *,
    gather: Gather,
) -> Tensor:
    """Return the mean of `distilled_cross_entropy` over the labelled positions, 0 without any.

    `gather` selects the ranks whose labelled positions are counted, see `labelled_count`.
    """
    losses = distilled_cross_entropy(logits, labels, teacher, alpha, smoothing)
    return losses.sum() / labelled_count(labels != IGNORED, gather)


def next_tokens(input_ids: Tensor, mask: Tensor) -> Tensor:
    """Return labels (B, L): the next token of each token, -100 without a real next one."""
    labels = input_ids.masked_fill(mask == 0, IGNORED)
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def at_least_fp32(values: Tensor) -> Tensor:
    """Convert to fp32 unless the dtype is wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
