"""Scores of written captions against references: CIDEr-D, BLEU-4, METEOR and SPICE.

    BLEU-4   min(1, e^(1 - r / c)) (p_1 p_2 p_3 p_4)^(1/4) of all captions, c words long; r: of the
             references that are closest in length
    CIDEr-D  10 times the mean, over n = 1..4 and an image's references, of e^(-(l_w - l_r)^2 / 72)
             and the cosine of tf-idf n-grams, those of the written caption clipped

They are pycocoevalcap's, as COCO's own evaluation computes them. It tokenises by Stanford's PTB
tokenizer, which needs Java, as METEOR and SPICE do; where there is none, a plain rule takes its
place, and the result says so: scores of two tokenizers are not compared.
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

from elip_models.tasks.intervals import Interval, bootstrap_interval, interval_of
from elip_models.validation import check, require_extra

InJava = Literal["meteor", "spice"]
TokenizerName = Literal["ptb", "plain"]
Texts = list[list[str]]
WORD = re.compile(r"n't\b|'(?:s|re|ve|ll|d|m)\b|\w+?(?=n't\b)|\w+(?:[-.]\w+)*")


@dataclass(frozen=True)
class CaptionScores:
    """How well a set of images is captioned.

    scores: "cider", in [0, 10], "bleu_4" and what else was asked for, in [0, 1], with intervals
        over the images, the weights of CIDEr's words as they are; papers write 100 times as much.
    each: CIDEr-D of each image, whose mean is "cider".
    tokenizer: "ptb", as in COCO's evaluation, or "plain".
    """

    scores: dict[str, Interval]
    each: tuple[float, ...]
    tokenizer: TokenizerName


def caption_scores(
    written: Sequence[str],
    captions: Sequence[Sequence[str]],
    *,
    also: Sequence[InJava] = (),
    tokenizer: TokenizerName | None = None,
) -> CaptionScores:
    """Score a caption of each image.

    Args:
        written: of each image, without a prompt.
        captions: references of each, one or more. CIDEr weighs words by how few of the images have
            them in a reference: of a single image it is 0.
        also: "meteor", which takes Java and most of a minute, and "spice", which takes Java and,
            the first time, half a gigabyte from Stanford.
        tokenizer: None is "ptb" where there is Java, else "plain".

    Raises:
        ImportError: without the extra 'captioning'.
        TypeError, ValueError: an unknown name, one that needs Java where there is none, other
            lengths, or an image without a reference.
    """
    for name in also:
        check("also", name, InJava)
    check("tokenizer", tokenizer, TokenizerName | None)
    for name in (*also, tokenizer):
        if name not in ("plain", None) and not has_java():
            raise ValueError(f"{name}: expected java on the path, in which it runs, got none")
    _check_captions(written, captions)
    tokenizer = tokenizer or ("ptb" if has_java() else "plain")
    tokens_of = {"ptb": ptb_tokens, "plain": plain_tokens}[tokenizer]
    right = dict(enumerate(tokens_of([list(texts) for texts in captions])))
    said = dict(enumerate(tokens_of([[text] for text in written])))
    with require_extra("caption_scores"):
        from pycocoevalcap.cider.cider import Cider
    _, each = Cider().compute_score(right, said)
    scores = {"cider": bootstrap_interval(each), "bleu_4": _bleu(right, said)}
    scores |= {name: bootstrap_interval(_in_java(name, right, said)) for name in also}
    return CaptionScores(scores, tuple(map(float, each)), tokenizer)


def plain_tokens(texts: Texts) -> Texts:
    """Each text as words in lower case with a space between, signs dropped.

    "'s", "n't" and the like are words, as in PTB; hyphens and points inside a word stay.
    """
    return [[" ".join(WORD.findall(text.lower())) for text in several] for several in texts]


def ptb_tokens(texts: Texts) -> Texts:
    """The same by Stanford's PTB tokenizer, in Java."""
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
    """Whether a Java runtime answers."""
    if shutil.which("java") is None:
        return False
    return subprocess.run(["java", "-version"], capture_output=True, check=False).returncode == 0


def _bleu(right: dict[int, list[str]], said: dict[int, list[str]]) -> Interval:
    """BLEU-4 of all captions, by the library's counts of words and n-grams."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for image, texts in right.items():
        scorer += said[image][0], texts
    parts = []  # lengths, of the closest reference too; n-grams that are there, and right
    for caption in scorer.ctest:
        length = caption["testlen"]
        closest = min((abs(other - length), other) for other in caption["reflen"])[1]
        parts.append([length, closest, *caption["guess"], *caption["correct"]])
    parts = np.array(parts, dtype=np.float64)

    def of_drawn(drawn: np.ndarray) -> np.ndarray:
        length, closest, *counts = (drawn @ parts).T
        there, right = np.array(counts[:4]) + 1e-9, np.array(counts[4:]) + 1e-15  # as the library
        shortness = np.minimum(0, 1 - (closest + 1e-9) / (length + 1e-15))
        return np.exp(np.log(right / there).mean(0) + shortness)

    return interval_of(of_drawn, np.ones(len(parts), dtype=int))


def _in_java(name: InJava, right: dict[int, list[str]], said: dict[int, list[str]]) -> list[float]:
    """A score of each image."""
    if name == "meteor":
        from pycocoevalcap.meteor.meteor import Meteor

        return Meteor().compute_score(right, said)[1]
    from pycocoevalcap.spice.spice import Spice

    return [scored["All"]["f"] for scored in Spice().compute_score(right, said)[1]]


def _check_captions(written: Sequence[str], captions: Sequence[Sequence[str]]) -> None:
    if len(written) != len(captions) or not written:
        raise ValueError(
            f"written: expected a caption for each of the {len(captions)} images in captions, at "
            f"least one, got {len(written)}"
        )
    for image, texts in enumerate(captions):
        if isinstance(texts, str) or not any(text.strip() for text in texts):
            raise ValueError(
                f"captions: expected one reference or more of each image, in a list, got {texts!r} "
                f"of image {image}"
            )
