"""Normalisation of answers, as the VQA metric does it before it compares them.

    "Two"        lower case, and number words as digits            "2"
    "1,000"      no comma between digits                           "1000"
    "no. 2.5"    no period except the decimal point                "no 2.5"
    "red/blue"   punctuation to spaces, except ' : $ % & # * ^ | ~ "red blue"
    "the dog"    without articles                                  "dog"
    "dont"       contractions with their apostrophe                "don't"

Source: VQA (Antol et al., 2015), and the evaluation page of visualqa.org.
"""

import re
from functools import lru_cache

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
ARTICLES = ("a", "an", "the")
PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_\->\<@`,?!]")
NO_DECIMAL = re.compile(r"\.(?!\d)")
THOUSANDS = re.compile(r"(?<=\d),(?=\d)")
STEMS = {  # by suffix; without stems such as "it" of "it's", since "its" is another word
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
    stem + part[1:]: stem + part for part, stems in STEMS.items() for stem in stems.split()
}


@lru_cache(2**16)
def normalise_answer(answer: str) -> str:
    """Normalise an answer: "The 2 dogs." becomes "2 dogs". "the" alone is unchanged."""
    text = THOUSANDS.sub("", answer.lower())
    text = PUNCTUATION.sub(" ", NO_DECIMAL.sub("", text))
    words = (DIGITS.get(word, word) for word in text.split() if word not in ARTICLES)
    return " ".join(CONTRACTIONS.get(word, word) for word in words) or answer
