"""Rules that change a caption before it is tokenized.

    plain    no change
    albef    lower case; , . ' ! ? " ( ) * # : ; ~ removed; - and / to spaces; <person> to person
    blip     lower case; . ! " ( ) * # : ; ~ to spaces
    blip_question    lower case; the same characters removed

The rules other than `plain` keep 30 words, by default. None adds a prompt in pre-training: BLIP's
"a picture of " belongs to its fine-tuning on captions.
Source: pre_caption of ALBEF and BLIP, pre_question of BLIP; the papers do not describe the rules.
"""

from typing import Literal

CaptionRule = Literal["plain", "albef", "blip", "blip_question"]

MAX_WORDS = 30
_REPLACED: dict[CaptionRule, dict] = {
    "albef": str.maketrans({**dict.fromkeys(",.'!?\"()*#:;~"), "-": " ", "/": " "}),
    "blip": str.maketrans(dict.fromkeys('.!"()*#:;~', " ")),
    "blip_question": str.maketrans(dict.fromkeys('.!"()*#:;~')),
}


def apply_caption_rule(caption: str, rule: CaptionRule, max_words: int = MAX_WORDS) -> str:
    """Return the caption as the tokenizer reads it, which may be empty."""
    if rule == "plain":
        return caption
    text = caption.lower().translate(_REPLACED[rule])
    if rule == "albef":
        text = text.replace("<person>", "person")
    return " ".join(text.split()[:max_words])
