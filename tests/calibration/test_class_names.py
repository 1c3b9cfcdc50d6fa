"""Names of the classes of a head."""

import pytest
import timm
import transformers

from elip_models.calibration.class_names import (
    class_numbers,
    head_classes,
    known_labels,
    names_in_texts,
)
from tests.helpers.towers import plain_vit


def test_a_head_of_imagenet_has_synsets_and_names():
    classes = head_classes(timm.create_model("test_vit"))
    assert len(classes) == 1000
    labels = ["n01440764", "goldfish", "Great_white_shark"]
    assert class_numbers(labels, classes) == dict(zip(labels, range(3), strict=True))
    assert class_numbers(["0", "999"], classes) == {"0": 0, "999": 999}


def test_a_head_has_the_names_of_its_config():
    model = timm.create_model("test_vit", num_classes=2)
    model.pretrained_cfg = {"label_names": ["cat", "dog"], "label_descriptions": {"dog": "hound"}}
    assert head_classes(model) == [("cat",), ("dog", "hound")]
    assert class_numbers(["Hound", "cat"], head_classes(model)) == {"Hound": 1, "cat": 0}


def test_a_head_of_transformers_has_the_names_of_its_config():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 16}
    config = transformers.ViTConfig(**sizes, intermediate_size=8, id2label={0: "cat", 1: "dog"})
    assert head_classes(transformers.ViTForImageClassification(config)) == [("cat",), ("dog",)]
    assert head_classes(transformers.ViTModel(config)) is None
    config = transformers.ViTConfig(**sizes, intermediate_size=8, num_labels=3)
    assert head_classes(transformers.ViTForImageClassification(config)) == [()] * 3


def test_a_model_without_a_head_has_no_classes():
    assert head_classes(plain_vit(num_classes=0)) is None


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", "dgo"], "labels: expected a class of the head, got 'dgo'; did you mean 'dog'"),
        (["0", "2"], "labels: expected a number below 2, got '2'"),
        (["0", "cat"], "labels: expected a class of the head, got '0'"),
        (["crane"], "got 'crane', which names the classes 134, 517; pass numbers or WordNet ids"),
    ],
)
def test_a_label_that_the_head_does_not_know_is_named(labels, message):
    classes = [("cat",), ("dog",)]
    if labels == ["crane"]:
        classes = head_classes(timm.create_model("test_vit"))
    with pytest.raises(ValueError, match=message):
        class_numbers(labels, classes)


def test_labels_belong_to_a_head_by_their_names_or_by_all_its_numbers():
    classes = [("cat",), ("dog",), ("owl",)]
    assert known_labels(["cat", "dog", "typo"], classes)
    assert not known_labels(["cat", "house", "tree"], classes)
    assert known_labels(["0", "1", "2"], classes)
    assert not known_labels(["0", "1"], classes)


def test_texts_name_wordnet_ids_by_imagenets_names():
    assert names_in_texts(["n01440764"]) == ["tench"]
    assert names_in_texts(["red_panda", "n01440764"]) == ["red panda", "n01440764"]
