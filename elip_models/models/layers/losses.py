"""The objectives of pre-training: losses, and what a step draws for them.

ITC   cross entropies of the similarities s f_image f_text^T, by rows and columns  CLIP
      or of each pair alone, whether it is one: -log sigmoid(+-(s f_i f_t + b))    SigLIP
      soft targets y = alpha softmax(s_m) + (1 - alpha) I over [batch | queue]    ALBEF, Eq. 6
ITM   negatives drawn by the softmax of the batch's similarities, never the pair itself
MLM   15% of the tokens or words: 80% [MASK], 10% another, 10% as they were       BERT
LM    each token from those before it, with label smoothing                       BLIP
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_kernels.autocast import no_autocast
from elip_models.models.layers.distributed import Gather, all_gather, labelled_count, rank_of

IGNORED = -100  # of cross entropy


def soft_contrastive_loss(
    similarities: tuple[Tensor, Tensor],
    momentum: tuple[Tensor, Tensor],
    alpha: Tensor | float,
    first: int = 0,
    positives: Tensor | None = None,
) -> Tensor:
    """Compute ITC with momentum distillation, the mean of both directions, in fp32.

    Args:
        similarities: image-to-text and text-to-image (B, C), over the temperature.
        momentum: the same of the momentum encoders; without gradient.
        alpha: weight of the momentum targets.
        first: row i is the pair of column first + i.
        positives: (B, C) bool, columns that are as right for a row as its pair; None: it alone is.
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
    """Draw for each row a column of another pair, by the row's softmax.

    Args:
        similarities: (B, C), over the temperature.
        epsilon: added to each weight, so that no row is all zero.
        first: row i is the pair of column first + i.
        positives: (B, C) bool, columns that are no negatives of a row either; where none is left,
            they are drawn still.

    Returns:
        (B,) int64. A single column has no negative but itself.
    """
    weights = similarities.float().softmax(1) + epsilon
    columns = torch.arange(weights.shape[1], device=weights.device)
    rows = torch.arange(first, first + len(weights), device=weights.device)
    others = (columns != rows[:, None]).float()
    if positives is not None:
        negatives = others * ~positives
        others = torch.where(negatives.any(1, keepdim=True), negatives, others)
    weights = weights * others
    lonely = ~(weights.sum(1, keepdim=True) > 0)  # all is on the pair itself, or not a number
    weights = torch.where(lonely, others, weights)
    if len(columns) == 1:
        return torch.zeros_like(rows)
    return torch.multinomial(weights, 1)[:, 0]


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
    """Hide tokens for masked language modelling.

    Args:
        input_ids: (B, L).
        mask_token_id: in the place of 8 in 10 hidden tokens; one is another, one stays.
        special_token_ids: never hidden.
        vocab_size: tokens that another is drawn from.
        probability: that a token, or a word, is hidden.
        continues: (V,) bool, the tokens that go on with the word before them: words are hidden
            whole. None hides each token by itself.

    Returns:
        masked ids and labels, (B, L) each; labels are -100 where nothing is to be predicted.
    """
    drawn = torch.rand(2, *input_ids.shape, device=input_ids.device)
    special = torch.zeros_like(input_ids, dtype=torch.bool)
    for token in special_token_ids:
        special |= input_ids == token
    chance = drawn[0]
    if continues is not None:
        word = (~continues[input_ids]).cumsum(1).sub(1).clamp(min=0)
        chance = chance.gather(1, word)
    chosen = (chance < probability) & ~special
    labels = input_ids.masked_fill(~chosen, IGNORED)
    random = torch.randint_like(input_ids, vocab_size)
    replaced = torch.where(drawn[1] < 0.8, mask_token_id, input_ids)
    replaced = torch.where((drawn[1] >= 0.8) & (drawn[1] < 0.9), random, replaced)
    return torch.where(chosen, replaced, input_ids), labels


def mask_every_seventh(input_ids: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """Hide every seventh token, about the 15% of the papers, without drawing any -> as
    `mask_tokens`.
    """
    chosen = torch.arange(input_ids.shape[1], device=input_ids.device) % 7 == 1
    masked = torch.where(chosen, mask_token_id, input_ids)
    return masked, torch.where(chosen, input_ids, IGNORED)


def next_rows(count: int, device: torch.device) -> Tensor:
    """Number for each of `count` rows the one after it, the first for the last -> int64."""
    return torch.arange(count, device=device).roll(-1)


def distilled_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | None = None,
    alpha: Tensor | float = 0.0,
    smoothing: float = 0.0,
) -> Tensor:
    """Compute (1 - alpha) CE + alpha soft CE against the teacher, of each label by itself.

    Args:
        logits, teacher: (.., V); the teacher's without gradient, or None.
        labels: (..), -100 = ignored.
        alpha: weight of the teacher.
        smoothing: of the labels.

    Returns:
        (..) fp32, of fp64 logits fp64; 0 where ignored.
    """
    logits = at_least_fp32(logits)
    hard = F.cross_entropy(
        logits.flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=smoothing,
    ).view_as(labels)
    if teacher is None:
        return hard
    soft = -(logits.log_softmax(-1) * at_least_fp32(teacher).softmax(-1)).sum(-1)
    return (1 - alpha) * hard + alpha * soft * (labels != IGNORED)


def distilled_language_loss(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | None = None,
    alpha: Tensor | float = 0.0,
    *,
    gather: Gather,
) -> Tensor:
    """Compute the mean of `distilled_cross_entropy` over labelled positions.

    Where no position is labelled it is 0.

    Args:
        logits, labels, teacher, alpha: as there, (B, L, V) and (B, L).
        gather: whose labelled positions are counted, see `labelled_count`.
    """
    losses = distilled_cross_entropy(logits, labels, teacher, alpha)
    return losses.sum() / labelled_count(labels != IGNORED, gather)


def next_tokens(input_ids: Tensor, mask: Tensor) -> Tensor:
    """Label each token of input_ids, mask (B, L) by the one after it -> (B, L), -100 where no real
    one follows.
    """
    labels = input_ids.masked_fill(mask == 0, IGNORED)
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def language_loss(logits: Tensor, labels: Tensor, *, smoothing: float, gather: Gather) -> Tensor:
    """Compute LM: cross entropy of each next token, the mean over the labelled ones, in fp32.

    Where no position is labelled it is 0.

    Args:
        logits: (B, L, V).
        labels: (B, L), see `next_tokens`.
        smoothing: of the labels.
        gather: whose labelled positions are counted, see `labelled_count`.
    """
    losses = distilled_cross_entropy(logits, labels, smoothing=smoothing)
    return losses.sum() / labelled_count(labels != IGNORED, gather)


def at_least_fp32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    scale: Tensor,
    *,
    gather: Gather = "local",
    image_ids: Tensor | None = None,
) -> Tensor:
    """Compute the symmetric cross entropy over the batch.

    Args:
        image_features, text_features: (B, E), normalised; row i of both is one pair.
        scale: scalar, the inverse temperature.
        image_ids: (B,) int64, equal where two pairs show the same image: all of them are right
            then, in equal parts. None: each pair alone is.
        gather: 'local' takes negatives from this rank; 'global' from all ranks, so that the mean
            over ranks, and its gradient, equal one process with the whole batch.

    Returns:
        Scalar, fp32.
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
    """Compute SigLIP's loss: each image with each text is a pair or not, by itself; the sum over
    all B^2, divided by B.

    Args:
        image_features, text_features: (B, E), normalised; row i of both is one pair.
        scale, bias: scalars, of the similarities.
        gather: as of `contrastive_loss`; only texts are gathered.

    Returns:
        Scalar, fp32.
    """
    B = image_features.shape[0]
    images, texts = image_features.float(), all_gather(text_features.float(), gather)
    with no_autocast(images):
        logits = scale.float() * images @ texts.T + bias.float()
    columns = torch.arange(len(texts), device=images.device)
    rows = torch.arange(B, device=images.device) + rank_of(gather) * B
    signs = torch.where(rows[:, None] == columns, 1.0, -1.0)
    return -F.logsigmoid(signs * logits).sum() / B
