"""VQA accuracy: an answer is right to the degree that people gave it too.

Ten people answered each question. An answer that three of them gave is fully right, and what is
averaged is that over the ten sets of nine: min(m / 3, 1) with the m of a set that agree. So m of
ten are worth 0.3, 0.6, 0.9, and 1 from four on.

Before answers are compared, the model's and people's, their writing is made alike:

    "Two"        lower case, and number words as digits            "2"
    "1,000"      no comma between digits                           "1000"
    "no. 2.5"    no period but a decimal one                       "no 2.5"
    "red/blue"   punctuation is a space; not ' : $ % & # * ^ | ~   "red blue"
    "the dog"    without articles                                  "dog"
    "dont"       contractions with their apostrophe                "don't"

Source: VQA (Antol et al., 2015), and the evaluation page of visualqa.org.
"""

import re
from collections.abc import Sequence

import numpy as np

ENOUGH = 3  # people who agree
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
ARTICLES = ("a", "an", "the")
PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_\->\<@`,?!]")
NO_DECIMAL = re.compile(r"\.(?!\d)")
THOUSANDS = re.compile(r"(?<=\d),(?=\d)")
PARTS = {  # what an apostrophe joins, but for what is another word without it, such as "its"
    "'t": "ain aren can couldn didn doesn don hadn hasn haven isn mightn mustn needn oughtn shan "
    "shouldn wasn weren won wouldn",
    "'ve": "could i might must not should they we what who would you",
    "'d": "he how it that there they what when where who why you",
    "'ll": "how it somebody someone something that there they what who why you",
    "'s": "he here how she somebody someone something that there what when where who why",
    "'re": "there they what why you",
    "'m": "i",
    "'all": "y",
    "'am": "ma",
    "'clock": "o",
}
CONTRACTIONS = {
    stem + part[1:]: stem + part for part, stems in PARTS.items() for stem in stems.split()
}


def normalise_answer(answer: str) -> str:
    """Write an answer as answers are compared: "The 2 dogs." -> "2 dogs"."""
    text = THOUSANDS.sub("", answer.lower())
    text = PUNCTUATION.sub(" ", NO_DECIMAL.sub("", text))
    words = (DIGITS.get(word, word) for word in text.split() if word not in ARTICLES)
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


def vqa_accuracy(answer: str, given: Sequence[str]) -> float:
    """How right an answer is, in [0, 1].

    Args:
        answer: of a model.
        given: what people answered, ten of them in VQA; at least two.
    """
    people = len(given)
    if people < 2:
        raise ValueError(f"given: expected the answers of at least two people, got {people}")
    agree = [normalise_answer(each) for each in given].count(normalise_answer(answer))
    without_one, with_all = min((agree - 1) / ENOUGH, 1.0), min(agree / ENOUGH, 1.0)
    return (agree * without_one + (people - agree) * with_all) / people


def vqa_accuracies(answers: Sequence[str], given: Sequence[Sequence[str]]) -> np.ndarray:
    """`vqa_accuracy` of each question: answers (Q,), given (Q,) of what people said -> (Q,)."""
    return np.array([vqa_accuracy(*pair) for pair in zip(answers, given, strict=True)])
