"""ALBEF's downstream models against the official ones, and their other properties."""

import copy
import math
from pathlib import Path

import pytest
import torch
from elip_models.pretraining.models.albef.classification import ALBEFNLVR2, ALBEFEntailment
from elip_models.pretraining.models.albef.retrieval import ALBEFRetrieval
from elip_models.pretraining.models.albef.vqa import ALBEFVQA
from elip_models.pretraining.models.layers.generated_answers import QuestionStates, score_candidates
from safetensors.torch import load_file

from elip_models.pretraining.models.layers.losses import hard_negatives, soft_contrastive_loss
from elip_models.pretraining.models.layers.momentum import NO_IMAGE
from elip_models.pretraining.models.momentum_model import Negatives
from elip_models.reduction.strategies import STRATEGIES
from tests.helpers import cross_modal_cases
from tests.helpers.cross_modal_cases import DISTILLED, MASK, SIZES, batch_of_four
from tests.helpers.golden_weights import matrix, ruled
from tests.helpers.tiers import tiered
from tests.helpers.towers import assert_equal_gradients, gradients
from tests.helpers.weights import assert_equal_weights
from tests.pretraining.models.test_every_strategy import OPTIONS

GOLDEN = Path(__file__).parents[2] / "golden"
OFFICIAL = {
    "image_size": 24,
    "patch_size": 8,
    "vision_depth": 2,
    "vision_mlp_ratio": 2.0,
    **{f"{part}_width": 8 for part in ("vision", "text")},
    **{f"{part}_heads": 2 for part in ("vision", "text")},
    "text_hidden": 16,
    "text_dropout": 0.0,
    "vocab_size": 30,
    "context_length": 8,
    "max_positions": 8,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "mask_token_id": 3,
    "embed_dim": 6,
    "queue_size": 8,
}
DEPTHS = {
    ALBEFVQA: {"text_depth": 7, "text_layers": 1},
    ALBEFEntailment: {"text_depth": 4, "text_layers": 2},
    ALBEFNLVR2: {"text_depth": 12, "text_layers": 6},
    ALBEFRetrieval: {"text_depth": 4, "text_layers": 2},
}
THEIRS = {  # how names begin, ours and theirs
    "encoders.visual.": "visual_encoder.",
    "encoders.text.layers.": "text_encoder.encoder.layer.",
    "encoders.text.": "text_encoder.",
    "encoders.decoder.layers.": "text_decoder.bert.encoder.layer.",
    "encoders.decoder.": "text_decoder.bert.",
    "encoders.language_head.": "text_decoder.cls.",
    "encoders.classifier.": "cls_head.",
    "encoders.image_projection.": "vision_proj.",
    "encoders.text_projection.": "text_proj.",
    "itm_head.": "itm_head.",
    "temperature": "temp",
}
OWN = SIZES | DISTILLED | {"text_layers": 1, "mask_token_id": MASK}
TASKS = {model.task: model for model in (ALBEFVQA, ALBEFEntailment, ALBEFNLVR2, ALBEFRetrieval)}
STEPS = [(task, strategy) for task in TASKS for strategy in STRATEGIES]
QUICK = [("vqa", "elip"), ("entailment", "tome"), ("nlvr2", "adaptive"), ("retrieval", "evit")]


def official_name(name):
    online = name.replace("encoders_m.", "encoders.")
    ours = next(part for part in THEIRS if online.startswith(part))
    theirs = THEIRS[ours]
    if online != name:
        theirs = theirs.replace(".", "_m.", 1)
    return theirs + online.removeprefix(ours)


def official(model_class, **options):
    """Return the tensors of the official run and our model with its weights, in fp64."""
    case = load_file(GOLDEN / f"{model_class.family}.safetensors")
    config = model_class.config_class(**OFFICIAL, **DEPTHS[model_class], **options)
    model = model_class(config)
    for name, weight in model.named_parameters():
        if name != "temperature":
            weight.data = ruled(official_name(name), weight.shape).float()  # as theirs
    model.double().alpha.fill_(config.full_alpha)
    long = {n: t.long() for n, t in case.items() if not t.is_floating_point()}
    return case | long, model


def pixels(name, *batch):
    """Return the images (*batch, 3, 24, 24) with that name in the official run."""
    shape = *batch, 3, 24, 24
    return 2 * matrix(1, math.prod(shape), name).view(shape)


def text_of(case):
    return case["input_ids"], case["attention_mask"]


def assert_close(got, expected):
    """Compare with a tolerance of 2e-6 of the largest entry."""
    bound = 2e-6 * max(expected.abs().max().item(), 1e-12)
    torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=bound)


def assert_official_gradients(model, case):
    """Compare with a tolerance of 2e-6 of the largest entry of each tensor.

    For gradients that are zero except for rounding, such as those of a key's bias, the scale is a
    thousandth of the largest gradient of all.
    """
    expected = {n.removeprefix("grad/"): g for n, g in case.items() if n.startswith("grad/")}
    got = {official_name(n): g for n, g in gradients(model).items()}
    assert got.keys() == expected.keys()
    largest = max(grad.abs().max() for grad in expected.values())
    for name, grad in expected.items():
        bound = 2e-6 * max(grad.abs().max(), 1e-3 * largest)
        assert (got[name] - grad).abs().max() <= bound, name


def answers_of(case):
    """Return the recorded list of answers as a batch of up to three for each question."""
    counts, length = case["counts"].tolist(), case["answer_ids"].shape[1]
    ids, mask = torch.zeros(2, len(counts), max(counts), length, dtype=torch.long)
    weights, start = torch.zeros(len(counts), max(counts)), 0
    for row, count in enumerate(counts):
        those = slice(start, start + count)
        ids[row, :count], mask[row, :count] = case["answer_ids"][those], case["answer_mask"][those]
        weights[row, :count] = case["answer_weights"][those]
        start += count
    return ids, mask, weights


def test_vqa_is_the_official_one():
    case, model = official(ALBEFVQA)
    images = pixels("images", 3)
    out = model(images, *text_of(case), *answers_of(case))
    assert_close(out.loss, case["loss"])
    out.loss.backward()
    assert_official_gradients(model, case)
    _, plain = official(ALBEFVQA, distill=False)
    assert_close(plain(images, *text_of(case), *answers_of(case)).loss, case["loss_plain"])


def test_answers_are_ranked_as_officially():
    case, model = official(ALBEFVQA)
    images, text = pixels("images", 3), text_of(case)
    candidates = case["candidate_ids"], case["candidate_mask"]
    best = model.rank_answers(images, *text, *candidates, k=4)
    assert torch.equal(best, case["topk_ids"][:, 0])
    states = QuestionStates(model.encode_pair(images, *text), text[1])
    found = score_candidates(model.encoders.decode, states, *candidates, k=4)
    chances, order = (found.first + found.whole).softmax(1).sort(descending=True)
    assert torch.equal(found.numbers.gather(1, order), case["topk_ids"])
    assert_close(chances, case["topk_probs"])
    assert torch.equal(model.rank_answers(images, *text, *candidates, k=99), best)


@pytest.mark.parametrize("model_class", [ALBEFEntailment, ALBEFNLVR2])
def test_a_classifier_is_the_official_one(model_class):
    case, model = official(model_class)
    images = pixels("pairs", 3, 2) if model_class is ALBEFNLVR2 else pixels("images", 3)
    batch = images, *text_of(case), case["labels"]
    assert_close(model.logits(*batch[:3]), case["logits"])
    out = model(*batch)
    assert_close(out.logits, case["logits"])
    assert_close(out.loss, case["loss"])
    out.loss.backward()
    assert_official_gradients(model, case)
    _, plain = official(model_class, distill=False)
    assert_close(plain(*batch).loss, case["loss_plain"])


@torch.no_grad()
def fill_queue_(queue):
    for name in ("image", "text"):
        features = torch.nn.functional.normalize(matrix(6, 8, f"{name}_queue"), dim=0)
        getattr(queue, name).copy_(features)
    queue.ids.copy_(torch.tensor([9, 1, 4, NO_IMAGE, 5, 6, 7, 2]))
    queue.pointer.fill_(4)


def test_retrieval_is_the_official_one():
    case, model = official(ALBEFRetrieval)
    fill_queue_(model.queue)
    batch = pixels("shown", 4), *text_of(case), case["image_ids"]
    drawn = Negatives(case["negative_images"], case["negative_texts"])
    out = model(*batch, drawn=drawn)
    for name in ("loss", "loss_itc", "loss_itm"):
        assert_close(getattr(out, name), case[name])
    out.loss.backward()
    assert_official_gradients(model, case)
    for name in ("image", "text"):
        assert_close(getattr(model.queue, name), case[f"after/{name}_queue"])
    assert torch.equal(model.queue.ids, case["after/idx_queue"][0])
    assert torch.equal(model.queue.pointer, case["after/queue_ptr"])
    _, plain = official(ALBEFRetrieval, distill=False)
    fill_queue_(plain.queue)
    assert_close(plain(*batch, drawn=drawn).loss_itc, case["loss_itc_plain"])


def made(model_class, **options):
    """Create a model in fp64, with weights large enough to change its outputs."""
    model = model_class(model_class.config_class(**(OWN | options))).double()
    for weight in model.encoders.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.2)
    model.reset_momentum_()
    return model


def test_all_captions_of_an_image_are_positives_in_batch_and_queue():
    model, image_ids = made(ALBEFRetrieval), torch.tensor([7, 3, 7, 5])
    assert model.queue.ids.tolist() == [NO_IMAGE] * 6
    first = model(*batch_of_four(), image_ids)
    assert model.queue.ids.tolist() == [7, 3, 7, 5, NO_IMAGE, NO_IMAGE]
    positives = model.queue.positives(image_ids, image_ids).int().tolist()
    assert positives[0] == positives[2] == [1, 0, 1, 0, 1, 0, 1, 0, 0, 0]
    assert positives[1] == [0, 1, 0, 0, 0, 1, 0, 0, 0, 0]
    assert first.loss == first.loss_itc + first.loss_itm


def test_a_single_positive_is_the_pair_itself():
    similar = tuple(torch.randn(3, 5) for _ in range(2))
    teacher, pairs = tuple(torch.randn(3, 5) for _ in range(2)), torch.eye(3, 5, dtype=torch.bool)
    expected = soft_contrastive_loss(similar, teacher, 0.4)
    got = soft_contrastive_loss(similar, teacher, 0.4, positives=pairs)
    torch.testing.assert_close(got, expected)


def test_a_negative_never_shows_the_image_of_its_row():
    positives = torch.eye(4, dtype=torch.bool)
    positives[0, 2] = positives[2, 0] = True
    for _ in range(20):
        drawn = hard_negatives(torch.randn(4, 4), positives=positives)
        assert not positives.gather(1, drawn[:, None]).any()
    alone = hard_negatives(torch.randn(4, 4), positives=torch.ones(4, 4, dtype=torch.bool))
    assert (alone != torch.arange(4)).all()  # another caption of the image, if there is no more


@pytest.mark.parametrize("family", ["albef", "blip", "albef_retrieval"])
def test_matching_logits_are_those_of_itm(family):
    retrieval = family == "albef_retrieval"
    model = made(ALBEFRetrieval) if retrieval else cross_modal_cases.made(family)
    images, ids, mask = batch_of_four()
    tokens, image_mask = model.eval().matching_tokens(images)
    assert tokens.shape == (4, 17, 16) and image_mask is None  # no text, no reduction
    logits = model.matching_logits(tokens, image_mask, ids, mask)
    order = torch.tensor([2, 0, 3, 1])
    others = model.matching_logits(tokens[order], None, ids[order], mask[order])
    torch.testing.assert_close(others, logits[order])
    text = ids if family == "blip" else model.encode_text(ids, mask)
    expected = model.itm_head(model.fuse(text, mask, tokens)[:, 0])[:, 1]
    assert torch.equal(logits, expected.float())
    guided, _ = model.matching_tokens(images, model.text_cls(ids, mask))
    assert guided.shape[1] < 17


def batch_for(model):
    """Return `random_inputs` of four images, with texts of several lengths."""
    images, ids, mask = batch_of_four()
    return model.random_inputs(images) | {"input_ids": ids, "attention_mask": mask}


def reduced(task, strategy, **options):
    return made(TASKS[task], strategy=strategy, strategy_options=OPTIONS.get(strategy), **options)


def step(model, batch):
    torch.manual_seed(3)
    out = model(**batch)
    out.loss.backward()
    return out.loss.detach(), gradients(model)


@pytest.mark.parametrize(
    ("task", "strategy"), tiered(STEPS, QUICK, slow=[("vqa", "evit"), ("nlvr2", "pitome")])
)
def test_every_strategy_trains_and_checkpointing_changes_nothing(task, strategy):
    model = reduced(task, strategy)
    batch, other = batch_for(model), copy.deepcopy(model)
    other.set_grad_checkpointing()
    loss, expected = step(model, batch)
    same, recomputed = step(other, batch)
    assert loss.isfinite() and torch.equal(same, loss)
    assert expected.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert_equal_gradients(recomputed, expected)


@pytest.mark.parametrize("task", TASKS)
def test_all_patches_are_kept_by_default(task):
    config = TASKS[task].config_class()
    assert config.schedule is None and config.image_size == 384 and config.captions == "albef"
    assert config.distill and config.alpha == config.full_alpha == 0.4


@pytest.mark.parametrize("task", ["vqa", "entailment", "nlvr2"])
def test_the_text_guides_every_image_that_it_comes_with(task):
    model = made(TASKS[task])
    batch, found = batch_for(model), []
    model.encode_image = lambda *given: (
        found.append(given) or type(model).encode_image(model, *given)
    )
    model.encode_pair(batch["images"], batch["input_ids"], batch["attention_mask"])
    model(**batch)
    cls = model.text_cls(batch["input_ids"], batch["attention_mask"])
    images = batch["images"].flatten(0, -4)
    for seen, guides in found:
        assert torch.equal(seen, images)
        assert torch.equal(guides, cls.repeat_interleave(len(images) // 4, 0))
    assert len(found) == 2


@pytest.mark.parametrize("task", TASKS)
def test_a_saved_model_loads_with_equal_outputs(task, tmp_path):
    model = made(TASKS[task], distill=task == "retrieval").float()
    batch = {
        n: t.float() if t.is_floating_point() else t
        for n, t in batch_for(model).items()
        if n != "drawn"
    }
    if task == "retrieval":
        model(**batch)
    other = TASKS[task].from_pretrained(model.eval().save_pretrained(tmp_path)).eval()
    assert other.config == model.config
    assert_equal_weights(other, model)
    torch.manual_seed(0)
    expected = model(**batch).loss
    torch.manual_seed(0)
    assert torch.equal(other(**batch).loss, expected)


@pytest.mark.parametrize("task", TASKS)
def test_momentum_encoders_are_updated_in_training_only(task):
    model = made(TASKS[task])
    batch, momentum = batch_for(model), dict(model.encoders_m.named_parameters())
    for weight in model.encoders.parameters():
        weight.data += 0.1
    before = {n: p.clone() for n, p in momentum.items()}
    model.eval()(**batch)
    assert all(torch.equal(p, before[n]) for n, p in momentum.items())
    model.train()(**batch)
    online = dict(model.encoders.named_parameters())
    for name, p in momentum.items():
        torch.testing.assert_close(p, (before[name] + online[name]) / 2)


def test_entailment_does_not_warm_alpha_up():
    for task, alpha in (("entailment", 0.4), ("vqa", 0.2), ("nlvr2", 0.2), ("retrieval", 0.2)):
        model = made(TASKS[task])
        model.begin_step(5, 0.5)
        assert model.alpha.item() == pytest.approx(alpha)
    model = made(ALBEFRetrieval, distill=False)
    model.begin_step(5, 0.5)
    assert model.alpha == 0


def test_a_missing_answer_changes_no_loss():
    model = made(ALBEFVQA).eval()
    batch = batch_for(model)
    expected = model(**batch).loss
    for name in ("answer_ids", "answer_mask", "answer_weights"):
        empty = torch.zeros_like(batch[name][:, :1])
        batch[name] = torch.cat([batch[name], empty], dim=1)
    loss = model(**batch).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


@pytest.mark.slow
def test_a_momentum_tower_shares_or_scores_the_reduction():
    for options in ({"momentum_reduction": "shared"}, {"scorer": "momentum"}):
        for task in TASKS:
            model = made(TASKS[task], **options)
            assert model(**batch_for(model)).loss.isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guide": "other"}, "guide: expected 'own'"),
        ({"guide_negatives": 0.5}, r"guide_negatives: expected a number in \[0, 0\], got 0.5"),
        ({"num_classes": 0}, r"num_classes: expected an integer in \[1, 1048576\], got 0"),
    ],
)
def test_a_bad_config_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        made(ALBEFEntailment, **options)
