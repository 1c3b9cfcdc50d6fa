"""Weights of a pre-trained BLIP in its models of VQA, NLVR2, retrieval and captioning."""

import torch
from safetensors.torch import load_file

from elip_models.pretraining.models.blip.model import BLIP, BLIPConfig
from elip_models.saving.weights import load_weights
from tests.helpers.golden_weights import recorded, ruled
from tests.pretraining.models.test_blip_tasks import SIZES, fresh, mask_of


def pretrained(**options):
    model = BLIP(BLIPConfig(**(SIZES | options))).double()
    for name, weight in model.named_parameters():
        weight.data = ruled(name, tuple(weight.shape)) if name != "temperature" else weight.data
    return model.eval()


def begun(task, model, folder, missing=(), **options):
    """Create a model of the task from a saved BLIP, and from its state dict."""
    model.save_pretrained(folder)
    saved, states = load_file(folder / "model.safetensors"), []
    for weights in (saved, model.state_dict()):
        ours = fresh(task, **options).eval()
        before = {n: w.clone() for n, w in ours.state_dict().items()}
        load_weights(ours, type(ours).from_pretraining(weights, ours.config), allow_missing=missing)
        new = [n for n, w in ours.state_dict().items() if torch.equal(w, before[n])]
        states.append(ours.state_dict())
    assert all(torch.equal(w, states[1][n]) for n, w in states[0].items())
    return ours, {n for n in new if n.endswith(("weight", "ids"))}


def test_vqa_starts_with_both_towers_of_blip(tmp_path):
    model, case = pretrained(), recorded("blip_vqa")
    ours, new = begun("vqa", model, tmp_path, tie_decoder=True)  # of the pre-training config
    assert not new
    x, ids = case["images"], case["input_ids"]
    tokens, _ = model.encode_image(x)
    states = model.fuse(ids, mask_of(ids), tokens)
    assert torch.equal(ours.fuse_question(x, ids, mask_of(ids)), states)
    assert torch.equal(ours.predict(ids, mask_of(ids), states), model.predict(ids, ids, states))
    ours.decoder.layers[0].output.dense.weight.data.zero_()
    assert ours.encoders.text.layers[0].output.dense.weight.any()  # no longer shared


def test_captioning_starts_with_image_tower_and_decoder_of_blip(tmp_path):
    model, case = pretrained(), recorded("blip_captioning")
    ours, new = begun("captioning", model, tmp_path)
    assert not new
    x, ids = case["images"], case["input_ids"]
    logits = model.predict(ids, mask_of(ids), model.encode_image(x)[0])
    assert torch.equal(ours(x, ids, mask_of(ids)).logits, logits)


def test_retrieval_starts_with_all_of_blip_but_the_decoder(tmp_path):
    model, case = pretrained(), recorded("blip_retrieval")
    ours, new = begun("retrieval", model, tmp_path, missing=["queue.ids"])
    assert new == {"queue.ids"}
    x, ids = case["images"], case["input_ids"]
    assert torch.equal(ours.image_features(x), model.image_features(x))
    for part in ("text_features", "text_cls"):
        assert torch.equal(getattr(ours, part)(ids, ids), getattr(model, part)(ids, ids))
    tokens, _ = ours.encode_image(x)
    logits = ours.matching_logits(tokens, ids, mask_of(ids))
    assert torch.equal(logits, model.matching_logits(tokens, ids, mask_of(ids)))


def test_nlvr2_starts_with_two_copies_of_each_cross_attention(tmp_path):
    """Compare two equal images with one image in BLIP."""
    model, case = pretrained(), recorded("blip_nlvr2")
    sizes = {"text_depth": 3, "merge_from": 3}
    ours, new = begun("nlvr2", model, tmp_path, ["classifier.*"], **sizes)
    assert new == {"classifier.0.weight", "classifier.2.weight"}
    x, ids = case["images"][:, :1], case["input_ids"]
    states = model.fuse(ids, mask_of(ids), model.encode_image(x[:, 0])[0])
    logits = ours.logits(x.expand(-1, 2, -1, -1, -1), ids, mask_of(ids))
    torch.testing.assert_close(logits, ours.classifier(states[:, 0]))
    sizes = {"text_depth": 3, "merge_from": 1}
    _, new = begun("nlvr2", model, tmp_path, ["classifier.*", "*.merge_layer.*"], **sizes)
    assert {n for n in new if "merge" in n} == {
        f"encoders.text.layers.{i}.crossattention.output.merge_layer.weight" for i in (1, 2)
    }
