"""What a caption becomes before the tokenizer reads it.

    plain    nothing changes
    albef    lower case; , . ' ! ? " ( ) * # : ; ~ go; - and / become spaces; <person> is person
    blip     lower case; . ! " ( ) * # : ; ~ become spaces

The last two keep 30 words. Neither has a prompt in pre-training: BLIP's "a picture of " belongs to
its fine-tuning on captions.
Source: the rules of ALBEF's and BLIP's pre-training code, which are not in their papers.
"""

from typing import Literal

CaptionRule = Literal["plain", "albef", "blip"]

MAX_WORDS = 30
_ALBEF = str.maketrans({**dict.fromkeys(",.'!?\"()*#:;~"), "-": " ", "/": " "})
_BLIP = str.maketrans(dict.fromkeys('.!"()*#:;~', " "))


def apply_caption_rule(caption: str, rule: CaptionRule) -> str:
    """Caption -> what the tokenizer reads, which may be empty."""
    if rule == "plain":
        return caption
    text = caption.lower().translate(_ALBEF if rule == "albef" else _BLIP)
    if rule == "albef":
        text = text.replace("<person>", "person")
    return " ".join(text.split()[:MAX_WORDS])
