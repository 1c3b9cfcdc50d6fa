"""Rules that change a caption before it is tokenized.

    plain    no change
    albef    lower case; , . ' ! ? " ( ) * # : ; ~ removed; - and / to spaces; <person> to person
    blip     lower case; . ! " ( ) * # : ; ~ to spaces

The last two rules keep 30 words, by default. Neither adds a prompt in pre-training: BLIP's
"a picture of " belongs to its fine-tuning on captions.
Source: the pre-training code of ALBEF and BLIP; the papers do not describe the rules.
"""

from typing import Literal

CaptionRule = Literal["plain", "albef", "blip"]

MAX_WORDS = 30
_ALBEF = str.maketrans({**dict.fromkeys(",.'!?\"()*#:;~"), "-": " ", "/": " "})
_BLIP = str.maketrans(dict.fromkeys('.!"()*#:;~', " "))


def apply_caption_rule(caption: str, rule: CaptionRule, max_words: int = MAX_WORDS) -> str:
    """Return the caption as the tokenizer reads it, which may be empty."""
    if rule == "plain":
        return caption
    text = caption.lower().translate(_ALBEF if rule == "albef" else _BLIP)
    if rule == "albef":
        text = text.replace("<person>", "person")
    return " ".join(text.split()[:max_words])
