"""Weights of a pre-trained ALBEF in its downstream models, with and without momentum encoders."""

import pytest
import torch

from elip_models.saving.weights import load_weights
from tests.helpers.cross_modal_cases import TASKS as ALL_TASKS
from tests.helpers.cross_modal_cases import batch_of_four, made
from tests.helpers.own_warnings import UNGUIDED

TASKS = {model.task: model for model, _ in ALL_TASKS.values() if "albef" in model.family}


def pretrained():
    """Create an ALBEF whose momentum encoders differ from its encoders."""
    model = made("albef", text_depth=3)
    for weight in model.encoders_m.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return model


HEADS = {
    "vqa": (),
    "entailment": ("*.classifier.*",),
    "nlvr2": ("*.classifier.*",),
    "retrieval": ("queue.ids",),
}


def begun(task, model, **options):
    """Create a downstream model with the weights of the pre-trained one."""
    other = made(f"albef_{task}", text_depth=3, **options)
    weights = TASKS[task].from_pretraining(model.state_dict(), other.config)
    load_weights(other, weights, allow_missing=HEADS[task])
    return other


@UNGUIDED
@pytest.mark.parametrize("task", TASKS)
def test_a_downstream_model_has_the_pretrained_weights(task):
    """Check all weights except those of a new head."""
    model = pretrained()
    other, (images, ids, mask) = begun(task, model), batch_of_four()
    for ours, theirs in ((other.encoders, model.encoders), (other.encoders_m, model.encoders_m)):
        tokens, text = theirs.visual.forward_features(images), theirs.encode_text(ids, mask)
        assert torch.equal(ours.visual.forward_features(images), tokens)
        assert torch.equal(ours.encode_text(ids, mask), text)
        if task != "nlvr2":
            assert torch.equal(ours.fuse(text, mask, tokens), theirs.fuse(text, mask, tokens))
    if task == "retrieval":
        assert torch.equal(other.queue.image, model.queue.image)
        assert torch.equal(other.text_features(ids, mask), model.text_features(ids, mask))
        logits = [m.matching_logits(m.encode_image(images)[0], ids, mask) for m in (model, other)]
        assert torch.equal(*logits)


def test_a_decoder_starts_with_the_weights_of_the_fusion_layers():
    """Compare the decoder without causal mask with the fusion layers."""
    model = pretrained()
    other, (images, ids, mask) = begun("vqa", model), batch_of_four()
    for ours, theirs in ((other.encoders, model.encoders), (other.encoders_m, model.encoders_m)):
        tokens, hidden = theirs.visual.forward_features(images), theirs.text.embed(ids)
        assert torch.equal(ours.decoder.embed(ids), hidden)
        written = ours.decoder.run(hidden, mask, None, tokens)
        assert torch.equal(written, theirs.fuse(hidden, mask, tokens))
        assert torch.equal(ours.language_head(written), theirs.language_head(written))
    head, embeddings = other.encoders.language_head.predictions, other.encoders.decoder.embeddings
    assert head.decoder.weight is embeddings.word_embeddings.weight
    assert embeddings.word_embeddings is not other.encoders.text.embeddings.word_embeddings


def test_each_fusion_layer_is_copied_to_two_layers():
    model = pretrained()
    other, (_, ids, mask) = begun("nlvr2", model), batch_of_four()
    assert len(other.encoders.text.layers) == 1 + 2 * 2
    for ours, theirs in ((other.encoders, model.encoders), (other.encoders_m, model.encoders_m)):
        tokens, hidden = torch.randn(8, 17, 16).double(), theirs.encode_text(ids, mask)
        expected = hidden
        for i in (1, 2):
            for image in (tokens[0::2], tokens[1::2]):
                expected = theirs.text.run(expected, mask, range(i, i + 1), image)
        assert torch.equal(ours.fuse(hidden, mask, tokens), expected)
        for i in (1, 3):
            first, second = (ours.text.layers[j].crossattention.self for j in (i, i + 1))
            assert first.key is second.key and first.value is second.value
            assert first.query is not second.query
