"""Scores of generated captions against references: CIDEr-D, BLEU-4, METEOR and SPICE.

    BLEU-4   min(1, e^(1 - r / c)) (p_1 p_2 p_3 p_4)^(1/4) over all captions, with c words in all;
             r: words of the references with the closest lengths
    CIDEr-D  10 times the mean, over n = 1..4 and the references of an image, of the cosine of
             clipped tf-idf n-grams times e^(-(l_w - l_r)^2 / 72)

The scores are those of pycocoevalcap, as in COCO's own evaluation. It uses Stanford's PTB
tokenizer, which needs Java, as METEOR and SPICE do. Without Java, a plain tokenizer is used, and
the result names it. Scores with different tokenizers are not comparable.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from elip_models.intervals import Interval, bootstrap_interval, interval_of
from elip_models.validation import check, require_extra

JavaMetric = Literal["meteor", "spice"]
TokenizerName = Literal["ptb", "plain"]
Texts = list[list[str]]
WORD = re.compile(r"n't\b|'(?:s|re|ve|ll|d|m)\b|\w+?(?=n't\b)|\w+(?:[-.]\w+)*")


@dataclass(frozen=True)
class CaptionScores:
    """Scores of the captions of a set of images: "cider" in [0, 10], the others in [0, 1].

    Their intervals are over the images; the word weights of CIDEr are fixed. Papers report 100
    times as much.
    """

    scores: dict[str, Interval]
    each: tuple[float, ...]  # CIDEr-D of each image; the mean is "cider"
    tokenizer: TokenizerName


def caption_scores(
    written: Sequence[str],
    captions: Sequence[Sequence[str]],
    *,
    also: Sequence[JavaMetric] = (),
    tokenizer: TokenizerName | None = None,
    domains: Sequence[str] = (),
) -> CaptionScores:
    """Score one generated caption for each image, without a prompt, against its references.

    CIDEr weighs a word by the number of images whose references have it, so the score of a single
    image is 0. `also` may name "meteor" (about a minute) and "spice" (the first time, it downloads
    0.5 GB from Stanford); both need Java. The tokenizer None is "ptb" if Java is installed, else
    "plain".

    `domains` are the parts of the data that the images belong to, or "". Each has scores of its
    own, such as "in-domain_cider". CIDEr's word weights are those of all images, so that the score
    of all is the mean of the domains' weighted by their numbers of images.
    """
    for name in also:
        check("also", name, JavaMetric)
    check("tokenizer", tokenizer, TokenizerName | None)
    for name in [*also, tokenizer]:
        if name not in ("plain", None) and not has_java():
            raise ValueError(f"{name}: expected java on the PATH, got none; install Java")
    _check_captions(written, captions)
    if domains and len(domains) != len(written):
        raise ValueError(
            f"domains: expected one for each of the {len(written)} images, got {len(domains)}"
        )
    tokenizer = tokenizer or ("ptb" if has_java() else "plain")
    tokens_of = {"ptb": ptb_tokens, "plain": plain_tokens}[tokenizer]
    references = dict(enumerate(tokens_of([list(texts) for texts in captions])))
    generated = dict(enumerate(tokens_of([[text] for text in written])))
    with require_extra("caption_scores"):
        from pycocoevalcap.cider.cider import Cider
    _, each = Cider().compute_score(references, generated)
    by_image = {"cider": each} | {n: _java_scores(n, references, generated) for n in also}
    scores = {}
    for domain in ("", *sorted({*domains} - {""})):
        rows = [i for i in generated if not domain or domains[i] == domain]
        prefix = f"{domain}_" if domain else ""
        for name, values in by_image.items():
            scores[f"{prefix}{name}"] = bootstrap_interval([values[i] for i in rows])
        parts = ({i: texts[i] for i in rows} for texts in (references, generated))
        scores[f"{prefix}bleu_4"] = _bleu(*parts)
    return CaptionScores(scores, tuple(map(float, each)), tokenizer)


def plain_tokens(texts: Texts) -> Texts:
    """Tokenize texts: words in lower case with a space between, punctuation removed.

    "'s", "n't" and the like are words, as in PTB. Hyphens and points inside a word are kept.
    """
    return [[" ".join(WORD.findall(text.lower())) for text in several] for several in texts]


def ptb_tokens(texts: Texts) -> Texts:
    """Tokenize texts as Stanford's PTB tokenizer does, in Java."""
    with require_extra("caption_scores"):
        from pycocoevalcap.tokenizer import ptbtokenizer as ptb
    lines = [" ".join(text.split()) or "." for several in texts for text in several]
    jar = Path(ptb.__file__).parent / ptb.STANFORD_CORENLP_3_4_1_JAR
    options = "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"
    done = subprocess.run(
        ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), *options],
        input="\n".join(lines),
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    split = (line.split() for line in done.stdout.split("\n"))
    tokens = (" ".join(word for word in line if word not in ptb.PUNCTUATIONS) for line in split)
    return [[next(tokens) for _ in several] for several in texts]


@cache
def has_java() -> bool:
    """Return whether a Java runtime works."""
    if shutil.which("java") is None:
        return False
    return subprocess.run(["java", "-version"], capture_output=True, check=False).returncode == 0


def _bleu(references: dict[int, list[str]], generated: dict[int, list[str]]) -> Interval:
    """Return BLEU-4 of all captions, from the library's counts of words and n-grams."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for image, texts in references.items():
        scorer += generated[image][0], texts
    parts = []  # length, length of the closest reference, n-grams, correct n-grams
    for caption in scorer.ctest:
        length = caption["testlen"]
        closest = min((abs(other - length), other) for other in caption["reflen"])[1]
        parts.append([length, closest, *caption["guess"], *caption["correct"]])
    parts = np.array(parts, dtype=np.float64)

    def of_drawn(drawn: np.ndarray) -> np.ndarray:
        length, closest, *counts = (drawn @ parts).T
        total, correct = np.array(counts[:4]) + 1e-9, np.array(counts[4:]) + 1e-15  # as pycocoeval
        brevity = np.minimum(0, 1 - (closest + 1e-9) / (length + 1e-15))
        return np.exp(np.log(correct / total).mean(0) + brevity)

    return interval_of(of_drawn, np.ones(len(parts), dtype=int))


def _java_scores(
    name: JavaMetric, references: dict[int, list[str]], generated: dict[int, list[str]]
) -> list[float]:
    if name == "meteor":
        from pycocoevalcap.meteor.meteor import Meteor

        return Meteor().compute_score(references, generated)[1]
    from pycocoevalcap.spice.spice import Spice

    return [scored["All"]["f"] for scored in Spice().compute_score(references, generated)[1]]


def _check_captions(written: Sequence[str], captions: Sequence[Sequence[str]]) -> None:
    if len(written) != len(captions) or not written:
        raise ValueError(
            f"written: expected a caption for each of the {len(captions)} images in captions, at "
            f"least one, got {len(written)}"
        )
    for image, texts in enumerate(captions):
        if isinstance(texts, str) or not any(text.strip() for text in texts):
            raise ValueError(
                f"captions: expected references in a list for each image, got {texts!r} "
                f"for image {image}"
            )
