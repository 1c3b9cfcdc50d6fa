"""The part of a long question that ALBEF evaluates."""

import torch

from elip_models.pretraining.data import train_tokenizer
from elip_models.pretraining.models.registry import create_model

WORDS = [f"{a}{b}" for a in "abcdefgh" for b in "klmnopqr"]
LONG = " ".join(WORDS[:60])


def test_albef_evaluates_questions_of_50_words_uncut():
    """As dataset/vqa_dataset.py for 'test'; its training cuts at 30 words and 25 tokens."""
    tokenizer = train_tokenizer([" ".join(WORDS)] * 3, 2000)
    fields = {"max_positions": 512, "vocab_size": len(tokenizer), "context_length": 25}
    model = create_model("albef_tiny", task="vqa", **fields).eval()
    asked = [LONG, "what is it?"]
    tokens = model.tokenise(tokenizer, asked)
    words = [tokenizer.decode(row, skip_special_tokens=True) for row in tokens["input_ids"]]
    assert [text.split() for text in words] == [WORDS[:50], ["what", "is", "it"]]
    lengths = tokens["attention_mask"].sum(1)
    assert tokens["input_ids"].shape == (2, lengths.max()) and lengths[0] > 50
    images, alone = torch.randn(2, 3, 64, 64), model.tokenise(tokenizer, asked[1:])
    both = model.fuse_question(images, *tokens.values())[1, : lengths[1]]
    torch.testing.assert_close(both, model.fuse_question(images[1:], *alone.values())[0])
