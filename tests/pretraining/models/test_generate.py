"""BLIP generates captions and answers: against `predict` and the decoder of transformers."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.models.blip.configuration_blip import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from tests.helpers.cross_modal_cases import VOCABULARY, made
from tests.helpers.own_warnings import UNGUIDED

PAD, END, BEGIN = 0, 2, 4
LENGTHS = {"max_length": 12, "min_length": 1}
SHORT = GenerationConfig(num_beams=1, **LENGTHS)
BEAMS = GenerationConfig(num_beams=3, **LENGTHS)
NUCLEUS = GenerationConfig(do_sample=True, top_p=0.4, top_k=0, **LENGTHS)
LONGER = {"max_length": 12, "min_length": 9}


@pytest.fixture
def model():
    """Create a BLIP that ends some texts early."""
    model = made("blip", max_positions=16).eval()
    with torch.no_grad():
        model.language_head.predictions.bias[END] += 1.5
        model.language_head.predictions.bias[PAD] -= 100.0
    return model


def images(batch=6):
    return torch.randn(batch, 3, 16, 16).double()


def prompts(batch=6):
    return torch.randint(6, VOCABULARY, (batch, 2))


def lengths(ids):
    return (ids != PAD).sum(1)


def transformers_decoder(model):
    """Return the BLIP of transformers with the same weights."""
    config, state = model.config, model.state_dict()
    theirs = BlipTextLMHeadModel(
        BlipTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.text_width,
            encoder_hidden_size=config.text_width,
            intermediate_size=config.text_hidden,
            num_hidden_layers=config.text_depth,
            num_attention_heads=config.text_heads,
            max_position_embeddings=config.max_positions,
            pad_token_id=PAD,
            bos_token_id=BEGIN,
            sep_token_id=END,
        )
    ).double()
    names = {
        "bert.encoder.layer.": "decoder.layers.",
        "bert.": "decoder.",
        "cls.": "language_head.",
    }
    for name, weight in theirs.state_dict().items():
        theirs_begin = next(begin for begin in names if name.startswith(begin))
        weight.copy_(state[names[theirs_begin] + name.removeprefix(theirs_begin)])
    return theirs.eval()


@pytest.mark.parametrize(
    "decoding",
    [
        BEAMS,
        GenerationConfig(num_beams=3, repetition_penalty=1.5, **LONGER),
        GenerationConfig(**LONGER),
    ],
    ids=["beams", "beams, longer, penalty", "greedy, longer"],
)
def test_search_is_that_of_transformers_own_blip(model, decoding):
    tokens, prompt = torch.randn(6, 5, 16).double(), prompts()
    expected = transformers_decoder(model).generate(
        input_ids=torch.cat([torch.full((6, 1), BEGIN), prompt], 1),
        encoder_hidden_states=tokens,
        generation_config=decoding,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    got = model.generate_from_tokens(tokens, prompt=prompt, decoding=decoding)
    behind = (expected[:, :-1] == END).cumsum(1) > 0  # transformers fills with END where PAD is 0
    expected[:, 1:][behind] = PAD
    assert torch.equal(got, expected)
    assert lengths(got).min() >= decoding.min_length


@UNGUIDED
def test_nucleus_sampling_is_reproducible_and_stays_in_the_nucleus(model):
    x, drawn = images(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(model.generate(x, decoding=NUCLEUS))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    ids, greedy = drawn[0], model.generate(x, decoding=SHORT)
    assert not torch.equal(ids, greedy)
    tokens, _ = model.encode_image(x)
    with torch.no_grad():
        share = model.predict(ids, torch.ones_like(ids), tokens)[:, :-1].softmax(-1)
    written = share.gather(2, ids[:, 1:, None])
    before = (share * (share > written)).sum(-1)  # of more probable tokens
    assert (before[ids[:, 1:] != PAD] < NUCLEUS.top_p).all()


@UNGUIDED
@pytest.mark.parametrize("decoding", [SHORT, BEAMS], ids=["greedy", "beams"])
def test_a_caption_does_not_depend_on_the_others_of_its_batch(model, decoding):
    x, prompt = images(), prompts()
    together = model.generate(x, prompt=prompt, decoding=decoding)
    assert len(lengths(together).unique()) > 1
    for i, text in enumerate(together):
        alone = model.generate(x[i : i + 1], prompt=prompt[i : i + 1], decoding=decoding)[0]
        assert torch.equal(text[: lengths(together)[i]], alone)


@UNGUIDED
def test_a_bad_prompt_or_length_is_named_and_changes_no_mode(model):
    with pytest.raises(ValueError, match="prompt: expected ids without padding"):
        model.generate(images(2), prompt=torch.tensor([[7, 7], [7, PAD]]), decoding=SHORT)
    with pytest.raises(ValueError, match="max_length: expected 13, one more than"):
        model.train().generate(images(2), prompt=torch.full((2, 11), 7), decoding=SHORT)
    assert all(m.training for m in model.encoders.modules())
