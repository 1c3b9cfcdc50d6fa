"""Masking of whole words, as METER's recipe does."""

import pytest
import torch
from transformers import BertTokenizerFast

from elip_models.pretraining.data import load_tokenizer
from elip_models.pretraining.models.layers.losses import IGNORED, mask_tokens
from elip_models.pretraining.training.trainer import train
from tests.helpers.tiny_run import own_process, tiny_config

NAMES = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "a", "play", "##ing", "##s", "cat")
PAD, CLS, SEP, MASK, _, A, PLAY, ING, S, CAT = range(len(NAMES))
TEXT = [CLS, A, CAT, S, PLAY, ING, S, CAT, SEP, PAD]
WORDS = [[1], [2, 3], [4, 5, 6], [7]]  # places in TEXT
CONTINUES = torch.tensor([name.startswith("##") for name in NAMES])


def masked(ids, continues):
    return mask_tokens(
        ids,
        mask_token_id=MASK,
        special_token_ids=(PAD, CLS, SEP),
        vocab_size=len(NAMES),
        probability=0.15,
        continues=continues,
    )


@pytest.fixture
def word_pieces(tmp_path):
    """Return a tokenizer of BERT's kind."""
    (tmp_path / "vocab.txt").write_text("\n".join(NAMES) + "\n")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "word_pieces")
    return load_tokenizer(tmp_path / "word_pieces")


def test_words_are_masked_completely_or_not_at_all():
    torch.manual_seed(0)
    ids = torch.tensor(TEXT).repeat(4000, 1)
    hidden, labels = masked(ids, CONTINUES)
    chosen = labels != IGNORED
    assert not chosen[:, [0, -2, -1]].any()
    for word in WORDS:
        assert (chosen[:, word] == chosen[:, word[:1]]).all()
        assert chosen[:, word[0]].float().mean().item() == pytest.approx(0.15, abs=0.02)
    assert torch.equal(hidden[~chosen], ids[~chosen])
    assert torch.equal(labels[chosen], ids[chosen])
    one, other = chosen[:, 1], chosen[:, 2]  # words are drawn independently of one another
    assert (one & other).float().mean().item() == pytest.approx(0.15**2, abs=0.01)


def test_training_passes_the_tokenizer_to_the_model(word_pieces, tmp_path):
    settings = (
        f"data.tokenizer={tmp_path / 'word_pieces'}",
        "model.overrides.mask_whole_words=true",
        "optim.steps=1",
    )
    with own_process():
        result = train(tiny_config(tmp_path / "run", *settings, recipe="meter_tiny"))
    model = result.model.cpu()
    assert torch.equal(model.continues, CONTINUES) and "continues" not in model.state_dict()
    ids = word_pieces("a cats playings cat", return_tensors="pt").input_ids.repeat(200, 1)
    assert ids[0].tolist() == TEXT[:-1]
    chosen = model.draw(torch.zeros(200, 3, 32, 32), ids).labels != IGNORED
    assert chosen.any() and all((chosen[:, w] == chosen[:, w[:1]]).all() for w in WORDS)
