"""Scores of answers: METER's targets, the official VQA accuracy, exact match and ANLS.

`vqa_accuracy` follows the rule of the official `vqaEval.py`:

    strip_punctuation   a mark beside a space, and every mark of a text      "red, blue" "red blue"
                        with a number such as 1,000, is removed; any other   "t-shirt"   "t shirt"
                        becomes a space; a period stays before a digit       "no. 2.5"   "no 2.5"
    normalise_words     lower case, number words as digits,                  "Two dogs"  "2 dogs"
                        no articles, contractions with an apostrophe         "dont"      "don't"

The accuracy of a prediction is min(1, 3 x share of the people whose answer equals it). This is the
mean of min(1, n / 3) over all sets of nine of the ten people. Both steps are applied to the
prediction, and only `strip_punctuation` to the answers of people, where these disagree. A question
that all people answered with "none" is therefore never answered correctly.
Source: VQA (Antol et al., 2015), PythonEvaluationTools of its repository from 2017 to 2021, which
is also the file of ALBEF and ELIP (`vqaTools/vqaEval.py`).
"""

import re
from collections.abc import Sequence
from functools import lru_cache

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NO_DECIMAL = re.compile(r"\.(?!\d)")
THOUSANDS = re.compile(r"\d,\d")
STEMS = {  # of the corrected contractions, by ending
    "'t": "ain aren can couldn didn doesn don hadn hasn haven isn mightn mustn needn oughtn shan "
    "shouldn wasn weren won wouldn",
    "'t've": "couldn hadn mightn shouldn wouldn",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'d've": "he it she somebody someone something there they we who you y'all",
    "'ll": "how it somebody someone something they what who why you y'all",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you",
    "'all": "y",
    "'am": "ma",
    "'clock": "o",
    "'twas": "",
    "'s'at": "'ow",
}
CONTRACTIONS = {"somebody'd": "somebodyd"}  # as the official list has it
CONTRACTIONS |= {  # each form without one of its apostrophes
    form[:place] + form[place + 1 :]: form
    for form in (stem + end for end, stems in STEMS.items() for stem in stems.split(" "))
    for place in range(len(form))
    if form[place] == "'"
}


def soft_scores(answers: dict[str, float]) -> dict[str, float]:
    """Return the VQA score of each answer, min(1, 3 x share).

    Of ten people, one gives 0.3, two 0.6, three 0.9, and four or more 1. This equals the mean of
    min(1, n / 3) over any nine of the ten. METER uses these scores as targets.
    """
    return {answer: min(1.0, round(3 * share, 6)) for answer, share in answers.items()}


def strip_punctuation(text: str) -> str:
    """Return the text without punctuation, see the top of this file."""
    joins, kept = THOUSANDS.search(text) is not None, text
    for mark in PUNCTUATION:
        is_beside_space = f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if joins or is_beside_space else " ")
    return NO_DECIMAL.sub("", kept)


def normalise_words(text: str) -> str:
    """Return the text in lower case with digits and apostrophes, and without articles."""
    words = (DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(2**16)
def normalise_answer(answer: str) -> str:
    """Return an answer after both steps: "The two dogs." becomes "2 dogs", "the" becomes ""."""
    on_one_line = answer.replace("\n", " ").replace("\t", " ").strip()
    return normalise_words(strip_punctuation(on_one_line))


def vqa_accuracy(answers: dict[str, float], predicted: str) -> float:
    """Return the official accuracy in [0, 1] of a predicted answer.

    Args:
        answers: The answers as people wrote them, each with the share of the ten people.
        predicted: The answer of a model.
    """
    wanted = normalise_answer(predicted)
    of_people = strip_punctuation if len(answers) > 1 else str
    share = sum(share for answer, share in answers.items() if of_people(answer) == wanted)
    return soft_scores({wanted: share})[wanted]


def exact_match(answers: Sequence[str], predicted: str) -> float:
    """Return 1 if the prediction is one of the answers after `normalise_answer`, else 0."""
    wanted = normalise_answer(predicted)
    return float(any(normalise_answer(answer) == wanted for answer in answers))


def anls(answers: Sequence[str], predicted: str) -> float:
    """Return the normalised Levenshtein similarity to the nearest answer, 0 below one half.

    Case and spaces at the ends do not count. Source: ST-VQA (Biten et al., 2019), whose mean over
    questions is ANLS.
    """
    similarity = max(_similarity(_folded(answer), _folded(predicted)) for answer in answers)
    return similarity if similarity >= 0.5 else 0.0


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(a: str, b: str) -> float:
    """Return 1 minus the edits between two texts, divided by the length of the longer one."""
    edits = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        before, edits[0] = edits[0], i
        for j, other in enumerate(b, start=1):
            replaced = before + (letter != other)
            before = edits[j]
            edits[j] = min(replaced, before + 1, edits[j - 1] + 1)
    return 1 - edits[-1] / max(len(a), len(b), 1)
