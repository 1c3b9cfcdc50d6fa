"""Initialisation from pretrained towers: copied weights, new weights, and errors."""

from functools import partial

import pytest
import timm
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel, RobertaConfig, RobertaModel

from elip_models.pretraining.checkpoints.pretrained_towers import load_pretrained_towers_
from elip_models.pretraining.models.meter.config import ROBERTA
from elip_models.pretraining.models.registry import create_model
from tests.helpers.weights import assert_equal_weights

BERT = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "max_position_embeddings": 64,
}


def vit(**options):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 2, "depth": 12}
    model = timm.models.VisionTransformer(**sizes | options, num_classes=3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def clip_vit(**options):
    norm = partial(nn.LayerNorm, eps=1e-5)
    return vit(pre_norm=True, act_layer="quick_gelu", norm_layer=norm, **options)


def bert(kind=BertModel, **options):
    return kind(BertConfig(**BERT | options)).eval()


def assert_momentum_equals(model):
    assert_equal_weights(model.encoders_m, model.encoders)


@pytest.mark.parametrize("name", ["albef_tiny", "blip_tiny"])
@torch.no_grad()
def test_both_towers_compute_the_pretrained_outputs(name):
    model, image, text = create_model(name).eval(), vit(img_size=64), bert()
    crossing = model.encoders.text.layers[3].crossattention.self.query.weight.clone()
    load_pretrained_towers_(model, image, text)
    x, ids = torch.randn(2, 3, 64, 64), torch.randint(7, 1000, (2, 6))
    torch.testing.assert_close(model.encode_image(x)[0], image.forward_features(x))
    if name == "blip_tiny":
        text.embeddings.token_type_embeddings.weight.zero_()
        hidden = model.encode_text(ids, torch.ones_like(ids))
    else:
        layers, tower = range(4), model.encoders.text
        hidden = tower.run(tower.embed(ids), torch.ones_like(ids), layers)
    torch.testing.assert_close(hidden, text(ids).last_hidden_state)
    assert torch.equal(model.encoders.text.layers[3].crossattention.self.query.weight, crossing)
    assert_momentum_equals(model)


@torch.no_grad()
def test_meter_computes_the_outputs_of_roberta():
    sizes = {"vocab_size": 1024, "max_positions": 66, "mask_token_id": 1023}
    model = create_model("meter_tiny", **ROBERTA | sizes).eval()
    options = {"max_position_embeddings": 66, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    text = RobertaModel(RobertaConfig(**BERT | options)).eval()
    load_pretrained_towers_(model, text=text)
    ids = torch.randint(7, 1000, (2, 6))
    ids[1, 4:], head = ROBERTA["pad_token_id"], model.language_head.predictions
    mask = (ids != ROBERTA["pad_token_id"]).long()
    expected = text(ids, mask).last_hidden_state
    torch.testing.assert_close(model.encode_text(ids, mask)[mask == 1], expected[mask == 1])
    assert head.decoder.weight is not model.text.embeddings.word_embeddings.weight


@pytest.mark.parametrize("name", ["albef_tiny", "blip_tiny"])
def test_the_language_head_is_loaded_and_new_tokens_keep_their_rows(name):
    model = create_model(name, vocab_size=1026)
    text = bert(BertForMaskedLM)
    nn.init.normal_(text.cls.predictions.bias)
    end = model.encoders.text.embeddings.word_embeddings.weight[1024:].clone()
    load_pretrained_towers_(model, text=text)
    head = (model.encoders if name == "albef_tiny" else model).language_head.predictions
    assert torch.equal(head.transform.dense.weight, text.cls.predictions.transform.dense.weight)
    assert torch.equal(head.bias[:1024], text.cls.predictions.bias)
    rows = model.encoders.text.embeddings.word_embeddings.weight
    assert torch.equal(rows[:1024], text.bert.embeddings.word_embeddings.weight)
    assert torch.equal(rows[1024:], end)
    assert head.decoder.weight is rows
    if name == "blip_tiny":
        query = model.decoder.layers[2].attention.self.query.weight
        assert torch.equal(query, text.bert.encoder.layer[2].attention.self.query.weight)
    assert_momentum_equals(model)


@pytest.mark.parametrize(
    ("name", "argument", "tower", "message"),
    [
        (
            "albef_tiny",
            "vision",
            vit(embed_dim=32),
            r"expected shape: .*cls_token \(1, 1, 64\), got \(1, 1, 32\)",
        ),
        ("albef_tiny", "vision", vit(depth=11), r"missing: encoders\.visual\.blocks\.11"),
        ("albef_tiny", "vision", clip_vit(), r"2, 'gelu', 1e-06, .* got .*'quickgelu', 1e-05"),
        ("albef_tiny", "vision", vit(global_pool="avg"), "'token'.* got .*'avg'"),
        ("albef_tiny", "vision", "resnet50", "vision: expected 'timm:NAME' or a module"),
        (
            "blip_tiny",
            "text",
            bert(vocab_size=1025),
            r"word_embeddings.weight \(1024, 64\), got \(1025, 64\)",
        ),
        ("blip_tiny", "text", bert(num_attention_heads=4), r"\(2, 'gelu', .* got \(4, 'gelu'"),
        ("meter_tiny", "text", "bert-base-uncased", "text: expected 'hf:NAME' or a module"),
    ],
)
def test_an_error_names_the_cause_and_changes_nothing(name, argument, tower, message):
    model = create_model(name)
    before = {n: w.clone() for n, w in model.state_dict().items()}
    fitting = {"text": bert()} if argument == "vision" else {}
    with pytest.raises(ValueError, match=message):
        load_pretrained_towers_(model, **fitting | {argument: tower})
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
