"""Scores of generated captions against references: CIDEr-D and BLEU-4 of pycocoevalcap.

    BLEU-4   min(1, e^(1 - r / c)) (p_1 p_2 p_3 p_4)^(1/4) over all captions, with c words in all;
             r: words of the references with the closest lengths
    CIDEr-D  10 times the mean, over n = 1..4 and the references of an image, of the cosine of
             clipped tf-idf n-grams times e^(-(l_w - l_r)^2 / 72)

`words_of` splits texts into words, close to Stanford's PTB tokenizer, which needs Java. For scores
comparable with those of papers, pass the file of `submission` to pycocoevalcap's `COCOEvalCap`.
"""

import re
from collections.abc import Sequence

import numpy as np

from elip_models.intervals import Interval, bootstrap_interval, interval_of_totals
from elip_models.validation import require_extra

WORD = re.compile(r"n't\b|'(?:s|re|ve|ll|d|m)\b|\w+?(?=n't\b)|\w+(?:[-.]\w+)*")


def caption_scores(
    written: Sequence[str],
    captions: Sequence[Sequence[str]],
    domains: Sequence[str] | None = None,
) -> tuple[dict[str, Interval], list[float]]:
    """Score one generated caption for each image, without a prompt, against its references.

    Args:
        written: Generated captions, at least one.
        captions: References of each image.
        domains: Part of the data that each image belongs to, or "". Each domain has scores of its
            own, such as "in-domain_cider".

    Returns:
        "cider" in [0, 10] and "bleu_4" in [0, 1], of all images and by domain, and the CIDEr-D of
        each image. Papers report 100 times as much. CIDEr weighs a word by the number of images
        whose references have it, also for a domain; the score of a single image is 0.
    """
    with require_extra("caption_scores"):
        from pycocoevalcap.cider.cider import Cider
    references = {i: [words_of(text) for text in texts] for i, texts in enumerate(captions)}
    generated = {i: [words_of(text)] for i, text in enumerate(written)}
    _, ciders = Cider().compute_score(references, generated)
    domains = domains or [""] * len(written)
    scores = {}
    for domain in sorted({"", *domains}):
        prefix = f"{domain}_" if domain else ""
        rows = [i for i in generated if domain in ("", domains[i])]
        scores[f"{prefix}cider"] = bootstrap_interval([ciders[i] for i in rows])
        scores[f"{prefix}bleu_4"] = _bleu([(generated[i][0], references[i]) for i in rows])
    return scores, ciders.tolist()


def words_of(text: str) -> str:
    """Return the words of a text in lower case, with a space between, without punctuation.

    "'s", "n't" and the like are words, as in PTB. Hyphens and points inside a word are kept.
    """
    return " ".join(WORD.findall(text.lower()))


def _bleu(pairs: Sequence[tuple[str, list[str]]]) -> Interval:
    """Return BLEU-4 of all captions, from the library's counts of words and n-grams."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for pair in pairs:
        scorer += pair
    rows = []  # length, length of the closest reference, n-grams, correct n-grams
    for caption in scorer.ctest:
        length = caption["testlen"]
        closest = min((abs(other - length), other) for other in caption["reflen"])[1]
        rows.append([length, closest, *caption["guess"], *caption["correct"]])

    def bleu(totals: np.ndarray) -> np.ndarray:
        length, closest, *counts = totals.T
        total, correct = np.array(counts[:4]) + 1e-9, np.array(counts[4:]) + 1e-15  # as pycocoeval
        brevity = np.minimum(0, 1 - (closest + 1e-9) / (length + 1e-15))
        return np.exp(np.log(correct / total).mean(0) + brevity)

    return interval_of_totals(np.array(rows, dtype=np.float64), bleu)
