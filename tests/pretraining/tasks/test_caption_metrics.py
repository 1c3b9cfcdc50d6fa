"""Caption scores against worked examples and an independent implementation."""

import math
import sys
from collections import Counter

import pytest

from elip_models.pretraining.tasks import caption_metrics
from elip_models.pretraining.tasks.caption_metrics import (
    caption_scores,
    has_java,
    plain_tokens,
    ptb_tokens,
)

WRITTEN = [
    "a red cat sits on a mat",
    "two dogs run on the beach near the sea",
    "a man holds a small umbrella",
    "a cat",
]
CAPTIONS = [
    ["a cat sits on a red mat", "the red cat is on a mat", "a cat on a mat"],
    ["dogs run on the beach", "two brown dogs run near the sea"],
    ["a man with an umbrella", "the man holds a small blue umbrella in the rain"],
    ["a dog and a cat on a sofa"],
]
java = pytest.mark.skipif(not has_java(), reason="needs a Java runtime")


def ngrams(text, n):
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def bleu_4(written, captions):
    """Return BLEU-4 by the formulas of Papineni et al. (2002)."""
    log_precision, length, closest = 0.0, 0, 0
    for n in range(1, 5):
        right = there = 0
        for text, references in zip(written, captions, strict=True):
            most = Counter()
            for reference in references:
                most |= ngrams(reference, n)
            right += (ngrams(text, n) & most).total()
            there += ngrams(text, n).total()
        log_precision += math.log(right / there) / 4
    for text, references in zip(written, captions, strict=True):
        words = len(text.split())
        length += words
        closest += min((len(r.split()) for r in references), key=lambda m: (abs(m - words), m))
    return math.exp(log_precision + min(0.0, 1 - closest / length))


def cider_d(written, captions):
    """Return CIDEr-D by the formulas of Vedantam et al. (2015)."""
    scores = [0.0] * len(written)
    for n in range(1, 5):
        images = Counter(g for refs in captions for g in set().union(*(ngrams(r, n) for r in refs)))
        weight = {g: math.log(len(written) / count) for g, count in images.items()}
        unseen = math.log(len(written))

        def vector(text, n=n, weight=weight, unseen=unseen):
            return {g: c * weight.get(g, unseen) for g, c in ngrams(text, n).items()}

        for i, (text, references) in enumerate(zip(written, captions, strict=True)):
            said = vector(text)
            for reference in references:
                right = vector(reference)
                product = sum(min(said[g], right[g]) * right[g] for g in said.keys() & right.keys())
                norms = math.hypot(*said.values()) * math.hypot(*right.values())
                gap = len(text.split()) - len(reference.split())
                gaussian = math.exp(-(gap**2) / 72)
                share = gaussian * product / norms if norms else 0.0
                scores[i] += 10 * share / 4 / len(references)
    return scores


def test_scores_equal_the_published_formulas():
    found = caption_scores(WRITTEN, CAPTIONS, tokenizer="plain")
    assert found.each == pytest.approx(cider_d(WRITTEN, CAPTIONS), rel=1e-9)
    mean = sum(found.each) / 4
    assert found.scores["cider"].mean == pytest.approx(mean)
    assert found.scores["bleu_4"].mean == pytest.approx(bleu_4(WRITTEN, CAPTIONS), rel=1e-6)
    for score in found.scores.values():
        assert score.low < score.mean < score.high


def test_scores_worked_out_by_hand():
    found = caption_scores(["a b c d e"], [["a b c d f", "x"]], tokenizer="plain")
    precisions = 4 / 5 * 3 / 4 * 2 / 3 * 1 / 2
    assert found.scores["bleu_4"].mean == pytest.approx(precisions**0.25)
    short = caption_scores(["a b c d"], [["a b c d e f g h"]], tokenizer="plain")
    assert short.scores["bleu_4"].mean == pytest.approx(math.exp(1 - 8 / 4))
    same = caption_scores(["a b c d", "e f g h"], [["a b c d"], ["e f g h"]], tokenizer="plain")
    assert same.each == pytest.approx((10, 10))
    half = caption_scores(["a b", "c d"], [["a b", "x y"], ["c d"]], tokenizer="plain")
    assert half.each == pytest.approx((2.5, 5))  # two of four n; one of two references


def test_plain_words_are_split_as_in_ptb():
    text = "The dog's T-shirt isn't red; it's 3.5 feet (long)! Don't, they're \"here\""
    expected = "the dog 's t-shirt is n't red it 's 3.5 feet long do n't they 're here"
    assert plain_tokens([[text], []]) == [[expected], []]


@pytest.mark.exhaustive
@java
def test_captions_of_scenes_are_the_same_by_both_tokenizers(captions):
    assert plain_tokens([captions]) == ptb_tokens([captions])


@java
def test_ptb_tokens_equal_pycocoevalcap():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    texts = [["A dog's T-shirt, don't! (red) & \"x\"", "café; 3.5%"], ["U.S. -- half 1/2"], ["x"]]
    theirs = PTBTokenizer().tokenize(
        {i: [{"caption": text} for text in several] for i, several in enumerate(texts)}
    )
    ours = ptb_tokens([*texts, ["", "a\r\nb\u2028c"], [""]])
    assert ours == [*theirs.values(), ["", "a b c"], [""]]


def test_without_java_the_result_names_the_plain_tokenizer(monkeypatch):
    monkeypatch.setattr(caption_metrics, "has_java", lambda: False)
    found = caption_scores(WRITTEN, CAPTIONS)
    assert found.tokenizer == "plain"
    assert found.each == pytest.approx(cider_d(WRITTEN, CAPTIONS))
    for options in ({"also": ["meteor"]}, {"tokenizer": "ptb"}):
        with pytest.raises(ValueError, match=r"(meteor|ptb): expected java on the PATH"):
            caption_scores(WRITTEN, CAPTIONS, **options)


@java
@pytest.mark.exhaustive
def test_meteor_runs_in_java():
    found = caption_scores(
        ["a cat sits here", "x"], [["a cat sits here"], ["dog"]], also=["meteor"]
    )
    assert found.tokenizer == "ptb"
    assert found.scores["meteor"].mean == pytest.approx(0.5)  # one all right, the other not at all


@pytest.mark.parametrize(
    ("written", "captions", "message"),
    [
        (["a"], [], "written: expected a caption for each of the 0 images in captions, .*got 1"),
        ([], [], "written: expected a caption .*at least one, got 0"),
        (["a", "b"], [["a"], [" "]], r"captions: expected references.*got \[' '\] for image 1"),
        (["a"], ["a"], "captions: expected references in a list .*, got 'a' for image 0"),
    ],
)
def test_captions_that_cannot_be_scored_are_named(written, captions, message):
    with pytest.raises(ValueError, match=message):
        caption_scores(written, captions)


def test_a_missing_package_names_its_extra(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(ImportError, match=r"pip install 'elip-kernels\[captioning\]'"):
        caption_scores(WRITTEN, CAPTIONS, tokenizer="plain")
