"""Which part of a long question is evaluated by each model for VQA."""

import pytest
import torch

from elip_models.pretraining.data import train_tokenizer
from elip_models.pretraining.models.registry import create_model

WORDS = [f"{a}{b}" for a in "abcdefgh" for b in "klmnopqr"]
LONG = " ".join(WORDS[:60])


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(WORDS)] * 3, 2000)


def vqa(family, tokenizer, **options):
    fields = {"max_positions": 512, "vocab_size": len(tokenizer), **options}
    return create_model(f"{family}_tiny", task="vqa", **fields).eval()


def words_of(tokens, tokenizer):
    return [tokenizer.decode(row, skip_special_tokens=True).split() for row in tokens["input_ids"]]


def test_albef_evaluates_questions_of_50_words_uncut(tokenizer):
    """As dataset/vqa_dataset.py for 'test'; its training cuts at 30 words and 25 tokens."""
    model = vqa("albef", tokenizer, context_length=25)
    asked = [LONG, "what is it?"]
    tokens = model.tokenise(tokenizer, asked)
    assert words_of(tokens, tokenizer) == [WORDS[:50], ["what", "is", "it"]]
    lengths = tokens["attention_mask"].sum(1)
    assert tokens["input_ids"].shape == (2, lengths.max()) and lengths[0] > 50
    images, alone = torch.randn(2, 3, 64, 64), model.tokenise(tokenizer, asked[1:])
    both = model.fuse_question(images, *tokens.values())[1, : lengths[1]]
    torch.testing.assert_close(both, model.fuse_question(images[1:], *alone.values())[0])


@pytest.mark.parametrize(("family", "length"), [("blip", 35), ("meter", 50)])
def test_blip_and_meter_cut_questions_at_the_tokens_of_training(family, length, tokenizer):
    """models/blip_vqa.py, max_length=35; METER's config.py, max_text_len=50."""
    model = vqa(family, tokenizer, context_length=length)
    assert model.tokenise(tokenizer, [LONG])["input_ids"].shape == (1, length)
