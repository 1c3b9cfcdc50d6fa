"""Captioning: scores by hand and by the published formulas, domains of NoCaps, submissions."""

import json
import math

import pytest
from PIL import Image

from elip_models.pretraining.data import train_tokenizer
from elip_models.pretraining.models.blip.tasks import BLIPCaptioning
from elip_models.pretraining.tasks.caption_metrics import caption_scores, words_of
from elip_models.pretraining.tasks.captioning import Captioning
from tests.helpers.cross_modal_cases import SIZES
from tests.helpers.task_cases import LOADING, SIZE, Stub, Tokens
from tests.helpers.tiny_run import elip

DOMAINS = ("in-domain", "near-domain", "out-domain", "near-domain", "near-domain")
CAPTIONS = (
    ("a red dog on the grass", "the dog lies on green grass"),
    ("two cats sleep in a box", "cats in a brown box"),
    ("a fox jumps over a log", "the red fox jumps"),
    ("a bus stands in the street", "one bus in a wide street"),
    ("an owl sits on a branch", "the owl is on a tree branch"),
)
WRITTEN = (
    "a red dog on the grass",
    "two cats in a brown box",
    "a bird jumps over a log",
    "a bus in the street",
    "a cat sits on a branch",
)


@pytest.mark.parametrize(
    ("written", "captions", "bleu", "ciders"),
    [
        (["a b c d e"], [["a b c d f", "x"]], (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25, [0]),
        (["a b c d"], [["a b c d e f g h"]], math.exp(1 - 8 / 4), [0]),
        (["a b c d", "e f g h"], [["a b c d"], ["e f g h"]], 1, [10, 10]),
        (["a b", "c d"], [["a b", "x y"], ["c d"]], None, [2.5, 5]),  # two of four n; 1 of 2 texts
    ],
)
def test_scores_worked_out_by_hand(written, captions, bleu, ciders):
    scores, by_image = caption_scores(written, captions)
    assert by_image == pytest.approx(ciders)
    assert bleu is None or scores["bleu_4"].mean == pytest.approx(bleu)


def test_words_are_split_as_in_ptb():
    text = "The dog's T-shirt isn't red; it's 3.5 feet (long)! Don't, they're \"here\""
    assert words_of(text) == (
        "the dog 's t-shirt is n't red it 's 3.5 feet long do n't they 're here"
    )


def write_files(folder, *, known=range(5)):
    """A file in NoCaps' format, with the captions of the images `known`, or of none."""
    images, annotations = [], []
    for number, domain in enumerate(DOMAINS):
        name = f"{number:016x}.png"
        Image.new("RGB", (6, 5), (40 * number, 0, 0)).save(folder / name)
        images.append({"id": number, "file_name": name, "domain": domain, "open_images_id": "0"})
        texts = CAPTIONS[number] if number in known else ()
        annotations += [{"id": 0, "image_id": number, "caption": text} for text in texts]
    content = {"info": {}, "licenses": [], "images": images}
    content |= {"annotations": annotations} if known else {}
    (folder / "nocaps.json").write_text(json.dumps(content))
    return str(folder / "nocaps.json")


def evaluated(path, monkeypatch, **options):
    written = iter(WRITTEN)
    monkeypatch.setattr(
        Captioning, "write", lambda self, model, tokenizer, images: [next(written) for _ in images]
    )
    task = Captioning(**options)
    return task.evaluate(Stub(), Tokens(), task.open(path, image_size=SIZE), LOADING)


def test_each_domain_has_scores_with_the_word_weights_of_all_images(tmp_path, monkeypatch):
    result = evaluated(write_files(tmp_path), monkeypatch)
    scores, ciders = caption_scores(WRITTEN, CAPTIONS)
    assert result.scores["cider"] == scores["cider"]
    near = (1, 3, 4)
    of_domain = result.scores["near-domain_cider"].mean
    assert of_domain == pytest.approx(sum(ciders[i] for i in near) / 3)
    bleu = caption_scores([WRITTEN[i] for i in near], [CAPTIONS[i] for i in near])[0]["bleu_4"]
    assert result.scores["near-domain_bleu_4"] == bleu
    assert result.baselines["another image's"].keys() == result.scores.keys()
    assert len(result.scores) == 2 * (1 + len(set(DOMAINS)))


def test_the_command_writes_scores_and_captions(tmp_path):
    tokenizer = train_tokenizer(["a dog and a cat", "a picture of"] * 9, 300)
    sizes = SIZES | BLIPCaptioning.fit_tokenizer(tokenizer, 8) | {"max_positions": 24}
    model = BLIPCaptioning(BLIPCaptioning.config_class(**sizes))
    model.save_pretrained(tmp_path / "model", tokenizer=tokenizer)
    output, submission = tmp_path / "scores.json", tmp_path / "submission.json"
    settings = ("max_length=16", "repetition_penalty=1.1", f"submission={submission}")
    options = [part for setting in settings for part in ("--set", setting)]
    command = ["eval", "captioning", "--model", tmp_path / "model", "--output", output, *options]
    assert elip(*command, "--data", write_files(tmp_path)) == 0
    assert "out-domain_cider" in json.loads(output.read_text())["scores"]
    captions = json.loads(submission.read_text())
    assert [caption["image_id"] for caption in captions] == [0, 1, 2, 3, 4]
    assert elip(*command, "--data", write_files(tmp_path, known=())) == 0
    assert json.loads(output.read_text())["scores"] == {}


@pytest.mark.parametrize("known", [(), (0, 2)])
def test_captions_of_images_without_captions_are_written_for_the_server(
    known, tmp_path, monkeypatch
):
    output = tmp_path / "submission.json"
    path = write_files(tmp_path, known=known)
    result = evaluated(path, monkeypatch, submission=str(output))
    expected = [{"image_id": i, "caption": text} for i, text in enumerate(WRITTEN)]
    assert json.loads(output.read_text()) == expected
    assert result.num_examples == len(known) and result.num_skipped == 0
    assert [p.score is not None for p in result.predictions] == [i in known for i in range(5)]
    domains = {"in-domain_cider", "out-domain_cider"} if known else set()
    assert {name for name in result.scores if name.endswith("domain_cider")} == domains
