"""What a caption becomes by the rules of ALBEF and BLIP, by examples."""

import pytest

from elip_models.data.caption_rules import apply_caption_rule

WORDS = " ".join(f"w{number}" for number in range(40))


@pytest.mark.parametrize(
    ("caption", "albef", "blip"),
    [
        ("A Dog.", "a dog", "a dog"),
        ("A dog, a cat", "a dog a cat", "a dog, a cat"),
        ("the dog's toy", "the dogs toy", "the dog's toy"),
        ("what? (a toy!)", "what a toy", "what? a toy"),
        (
            "a red-brown and/or black dog",
            "a red brown and or black dog",
            "a red-brown and/or black dog",
        ),
        ("<PERSON> in front of a car", "person in front of a car", "<person> in front of a car"),
        ('at 10:30; #1 ~ "best" *', "at 1030 1 best", "at 10 30 1 best"),
        ("U.S.A", "usa", "u s a"),
        (" a  dog \n", "a dog", "a dog"),
        ("...", "", ""),
        ("Café 🐶", "café 🐶", "café 🐶"),
        (WORDS, WORDS.rpartition(" w30")[0], WORDS.rpartition(" w30")[0]),
    ],
)
def test_example(caption, albef, blip):
    assert apply_caption_rule(caption, "albef") == albef
    assert apply_caption_rule(caption, "blip") == blip
    assert apply_caption_rule(caption, "plain") == caption
