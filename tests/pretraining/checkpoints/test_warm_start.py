"""Warm start from a checkpoint: loaded, copied and new tensors, and errors."""

import pytest
import torch
from torch import nn

from elip_models.pretraining.checkpoints.export import save_as
from elip_models.pretraining.checkpoints.warm_start import warm_start_
from elip_models.pretraining.models.registry import create_model
from tests.helpers.weights import assert_equal_weights

FAMILIES = ("clip", "albef", "blip", "meter")
MOMENTUM = ("encoders_m.", "queue.")


def trained(name, **overrides):
    """Return a model as after training: all parameters differ from new ones and from momentum's."""
    model = create_model(name, **overrides)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def others(state):
    return {name: weight for name, weight in state.items() if not name.startswith(MOMENTUM)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reduced_model_gets_dense_weights_and_momentum_a_copy(family, tmp_path):
    source = trained(f"{family}_tiny")
    source.save_pretrained(tmp_path)
    model = create_model(f"elip_{family}_tiny")
    queue = {n: w.clone() for n, w in model.state_dict().items() if n.startswith("queue.")}
    start = warm_start_(model, tmp_path)
    state = model.state_dict()
    assert model.config.schedule is not None
    for name, weight in others(source.state_dict()).items():
        assert torch.equal(state[name], weight), name
    assert all(torch.equal(state[name], weight) for name, weight in queue.items())
    assert not start.interpolated
    if family in ("albef", "blip"):
        assert_equal_weights(model.encoders_m, model.encoders)
        assert start.copied == {"encoders_m.": "encoders."}
        assert start.new == ("queue.image", "queue.text", "queue.pointer")
        assert set(start.left_out) > set(start.new)
        assert all(name.startswith(MOMENTUM) for name in start.left_out)
    else:
        assert (start.copied, start.new, start.left_out) == ({}, (), ())


@pytest.mark.parametrize("name, task", [("albef_tiny", "vqa"), ("blip_tiny", "retrieval")])
def test_a_downstream_model_starts_from_one_of_its_own_task(name, task, tmp_path):
    source = create_model(name, task=task)
    source.save_pretrained(tmp_path)
    model = create_model(name, task=task)
    assert warm_start_(model, tmp_path).copied == {"encoders_m.": "encoders."}
    assert_equal_weights(model.encoders, source.encoders)
    assert_equal_weights(model.encoders_m, model.encoders)


def test_position_embeddings_are_interpolated_and_listed(tmp_path):
    source = trained("clip_tiny")
    save_as(source, tmp_path / "there", "open_clip")
    model = create_model("elip_clip_tiny", image_size=96)
    start = warm_start_(model, tmp_path / "there")
    assert torch.equal(model.visual.pos_embed[:, 0], source.visual.pos_embed[:, 0])
    assert torch.equal(model.text_projection.weight, source.text_projection.weight)
    assert start.interpolated == {"visual.pos_embed": "(65, 64) -> (1, 145, 64)"}
    lines = start.summary().splitlines()
    assert lines[0] == f"pretrained: {tmp_path / 'there'}"
    assert lines[1].startswith("  loaded        logit_scale, visual.cls_token, ")
    assert "visual.blocks 144" in lines[1]
    assert lines[2:] == [
        "  interpolated  visual.pos_embed (65, 64) -> (1, 145, 64)",
        "  copied        nothing",
        "  new           nothing",
        "  left out      nothing",
    ]


def test_named_tensors_stay_new_or_are_left_out(tmp_path):
    trained("clip_tiny", vocab_size=900).save_pretrained(tmp_path)
    model = create_model("clip_tiny", loss="sigmoid")
    new = model.text.transformer.embeddings.token_embedding.weight.clone()
    with pytest.raises(ValueError, match=r"missing: logit_bias; expected shape: .*\(1024, 64\)"):
        warm_start_(model, tmp_path)
    start = warm_start_(
        model,
        tmp_path,
        allow_missing=["logit_bias", "*.token_embedding.weight"],
        allow_unexpected=["*.token_embedding.weight"],
    )
    assert torch.equal(model.text.transformer.embeddings.token_embedding.weight, new)
    tokens = "text.transformer.embeddings.token_embedding.weight"
    assert set(start.new) == {"logit_bias", tokens}
    assert start.left_out == (tokens,)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"name": "clip_tiny", "loss": "sigmoid"}, "unexpected: logit_bias; name in allow_mi"),
        ({"name": "clip_tiny", "text_depth": 2}, r"missing: text\..*layers\.2"),
        ({"name": "albef_tiny"}, "expected a checkpoint of 'clip', got one of 'albef'"),
        ({"name": "clip_tiny", "activation": "quick_gelu"}, "activation: expected 'gelu'"),
        ({"name": "clip_tiny", "vision_heads": 4}, "vision_heads: expected 2.*got 4"),
    ],
)
def test_an_error_names_the_cause_and_changes_nothing(tmp_path, saved, message):
    create_model(**saved).save_pretrained(tmp_path)
    model = create_model("clip_tiny")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        warm_start_(model, tmp_path)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
