"""Answers and their likelihoods are those of the model's own library, and its settings fit it."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from elip_models.analysis.answer_scores import anls, exact_match
from elip_models.calibration.answers import Answers
from elip_models.calibration.data import Question
from elip_models.calibration.language_candidates import FewerPixels, image_tokens
from elip_models.calibration.task import Part
from elip_models.profiling.measure import count_step
from elip_models.strategies.flops import inference_ratio
from elip_models.towers import as_tower
from elip_models.vlm.install import language_strategies_in
from tests.helpers.models import hf_clip
from tests.integrations.vllm.checkpoints import MODELS

N, TOKENS = 9, 4
PROMPT = "user: <|image_pad|>{question} assistant:"


def conversation(question):
    content = [{"type": "image", "image": Image.open(path)} for path in question.images]
    content.append({"type": "text", "text": question.question})
    return [{"role": "user", "content": content}]


@torch.no_grad()
def plain(model, processor, question):
    """Return the greedy tokens, and the likelihood of a token of the first answer."""
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    prompt = processor.apply_chat_template(
        conversation(question), add_generation_prompt=True, **options
    )
    length = prompt["input_ids"].shape[1]
    tokens = model.generate(**prompt, do_sample=False, max_new_tokens=TOKENS)[0, length:]
    if not question.answers:
        return tokens, None
    log_probs = []
    answer = processor.tokenizer(question.answers[0], add_special_tokens=False)["input_ids"]
    for token in answer:  # one after the other, without a cache
        logits = model(**prompt).logits[0, -1].log_softmax(-1)
        log_probs.append(logits[token].item())
        for name, value in (("input_ids", token), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            if name in prompt:
                prompt[name] = torch.cat([prompt[name], torch.tensor([[value]])], dim=1)
    return tokens, np.exp(np.mean(log_probs))


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def opened(request):
    torch.manual_seed(0)
    config, processor = MODELS[request.param]()
    kind = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    return kind._from_config(config).eval(), processor


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    pixels = rng.integers(0, 256, (N, 112, 112, 3), dtype=np.uint8)
    pixels[0] = 200
    paths = [folder / f"{i}.png" for i in range(N)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    return paths


def asked(files, answers=()):
    """Return two questions about the first image, and one about each other."""
    rows = [Question((path,), "What is it?", answers) for path in files]
    return [*rows, Question((files[0],), "How many?", answers)]


def task_of(opened, questions, **options):
    model, processor = opened
    return Answers(questions, model=model, processor=processor, max_new_tokens=TOKENS, **options)


def rightly_asked(opened, files):
    """Return questions of which the model answers those about even images rightly."""
    model, processor = opened
    rows = []
    for i, row in enumerate(asked(files)):
        tokens, _ = plain(model, processor, row)
        text = processor.tokenizer.decode(tokens, skip_special_tokens=True)
        rows.append(row._replace(answers=("other", text) if i % 2 == 0 else ("other",)))
    return rows


def total(measure):
    return measure.statistic(measure.rows.sum(0)[None])[0]


def test_answers_and_likelihoods_are_those_of_the_library(opened, files):
    model, processor = opened
    questions = rightly_asked(opened, files)
    task, part, done = task_of(opened, questions), (0, 3, 4), []
    reduced = task.reduced(model, "diverse:keep=1.0")
    outputs = task.outputs(reduced, part, done.append)
    assert task.count == N and done == [1, 1, 1]
    wanted = [questions[0], questions[N], questions[3], questions[4]]
    got = [*zip(outputs["tokens"][0], outputs["likelihoods"][0], strict=True)]
    got += zip(outputs["tokens"][1:, 0], outputs["likelihoods"][1:, 0], strict=True)
    for (tokens, likelihood), question in zip(got, wanted, strict=True):
        own, probability = plain(model, processor, question)
        assert torch.equal(tokens[: len(own)].long(), own)
        assert likelihood.item() == pytest.approx(probability, rel=1e-4)
    measured = task.measured(Part(part, outputs, outputs))
    hits = sum(len(question.answers) == 2 for question in wanted)
    assert list(measured) == ["exact match", "likelihood", "agreement"]
    assert total(measured["exact match"]) == hits / 4 and total(measured["agreement"]) == 1
    assert measured["exact match"].rows[:, 1].tolist() == [2, 1, 1]
    mean = outputs["likelihoods"].double().sum().item() / 4
    assert total(measured["likelihood"]) == pytest.approx(mean)
    assert task.truths([3, 4]) == ["other", "other"] and len(task.answers(part, outputs)) == 3


def test_agreement_is_measured_without_right_answers(opened, files):
    model, _ = opened
    task, part = task_of(opened, asked(files)), range(N)
    dense = task.outputs(model, part, lambda count: None)
    outputs = task.outputs(task.reduced(model, "stride:keep=0.1"), part, lambda count: None)
    measured = task.measured(Part(part, outputs, dense))
    equal = (outputs["tokens"] == dense["tokens"]).all(2).double().sum(1)
    equal[1:] -= 1  # the second question, which these images do not have
    assert list(measured) == ["agreement"]
    assert total(measured["agreement"]) >= equal.sum().item() / (N + 1)
    assert 0 <= total(measured["agreement"]) < 1 and task.truths(part) is None


def test_prefill_and_decoding_are_timed_apart(opened, files):
    model, _ = opened
    task = task_of(opened, asked(files))
    steps = task.steps(task.reduced(model, "diverse:keep=0.5"), [1, 2])
    assert list(steps) == ["prefill", "decoding"]
    first, then = steps["prefill"](), steps["decoding"]()
    assert len(first) == len(then) == 2 and then.shape[1] - first.shape[1] == 16
    assert torch.equal(then, steps["decoding"]())


def test_settings_have_falling_flops_and_names_that_compare_reads(opened, files):
    model, _ = opened
    candidates = task_of(opened, asked(files)).candidates(model)
    for text in ("diverse", "fastv:layer=1", "pool"):
        ladder = candidates.falling(text)
        flops = [setting.flops for setting in ladder]
        assert flops == sorted(flops, reverse=True) and flops[0] < 1 and len(ladder) > 2
        assert candidates.compared(ladder[2].name) == ladder[2]
    assert candidates.compared("diverse 4").strategy.keep == 4
    of_tower = {"merge", "evit"} & {*candidates.strategies}
    assert len(of_tower) == (0 if type(model).__name__.startswith("Qwen") else 2)
    assert "diverse" in candidates.strategies and "pool" not in candidates.strategies


def test_a_strategy_that_cannot_reduce_these_prompts_is_refused(opened, files, tmp_path):
    model, _ = opened
    if not type(model).__name__.startswith("Qwen"):  # whose images have one size
        return
    wide = tmp_path / "wide.png"
    Image.new("RGB", (168, 112)).save(wide)
    rows = [Question((wide,), "What is it?"), *asked(files)]
    with pytest.raises(TypeError, match=r"these prompts, got 'pool': .*a square number of tokens"):
        task_of(opened, rows).candidates(model).falling("pool")


def test_flops_are_those_of_the_prefill(opened, files):
    model, _ = opened
    task = task_of(opened, asked(files))
    prompt, candidates = task._prompt(model, task.questions[1]), task.candidates(model)

    @torch.no_grad()
    def counted(model):
        return count_step(lambda: model(**prompt, logits_to_keep=1).logits, backward=False).forward

    for name in ("diverse 0.3", "fastv:layer=1 0.3"):
        setting = candidates.compared(name)
        share = counted(task.reduced(model, setting.strategy)) / counted(model)
        assert 1 - setting.flops == pytest.approx(1 - share, rel=0.1) and share < 1


def test_strategies_in_and_before_the_tower_are_tried_where_the_model_has_them(opened, files):
    model, _ = opened
    candidates = task_of(opened, asked(files)).candidates(model)
    if type(model).__name__.startswith("Qwen"):
        with pytest.raises(TypeError, match="image tower of its own kind"):
            candidates.falling("merge")
        lossless = candidates.falling("dedup")[0]  # one of eight images repeats itself
        assert lossless.name == "dedup:tolerance=0.0"
        assert 0.8 < lossless.kept < 1 and lossless.flops < 1
        return
    setting = candidates.falling("merge")[-1]
    size = as_tower(model).size
    assert inference_ratio(setting.strategy, size) < setting.flops < 1
    for text in ("resize", "dedup", "evs"):
        with pytest.raises(TypeError):
            candidates.falling(text)


def test_the_control_is_a_smaller_image_where_it_has_fewer_tokens(opened, files):
    model, _ = opened
    task = task_of(opened, asked(files))
    control = task.candidates(model).control(0.6)
    if not type(model).__name__.startswith("Qwen"):  # whose processor has one size
        assert control is None
        return
    assert control.flops == pytest.approx(0.6, abs=0.1)
    smaller = task.reduced(model, FewerPixels(0.5))
    prompts = [task._prompt(each, task.questions[1]) for each in (model, smaller)]
    tokens = [image_tokens(model, prompt) for prompt in prompts]
    assert tokens[1] < 0.7 * tokens[0]
    assert task.outputs(smaller, [1], lambda count: None)["tokens"].shape == (1, 2, TOKENS)
    assert set(task.steps(smaller, [1])) == {"prefill", "decoding"}


def test_a_file_of_a_setting_reduces_the_language_model(opened, files, tmp_path):
    model, _ = opened
    task = task_of(opened, asked(files))
    setting = task.candidates(model).compared("fastv:layer=1 0.25")
    file = tmp_path / "best.json"
    file.write_text(json.dumps({**setting.settings, "calibration": {}}))
    reduced = task.reduced(model, str(file))
    assert language_strategies_in(reduced) == (setting.strategy,)


def test_a_prompt_of_the_user_is_read(opened, files):
    model, processor = opened
    task = task_of(opened, asked(files), prompt=PROMPT)
    text = processor.tokenizer.decode(task._prompt(model, task.questions[1])["input_ids"][0])
    assert text.startswith("user: ") and text.endswith("What is it? assistant:")


def test_what_cannot_be_measured_is_refused_by_name(opened, files):
    model, processor = opened
    rows = asked(files)
    with pytest.raises(
        ValueError, match=r"right answers to all questions or to none.*questions\[1"
    ):
        task_of(opened, [rows[0]._replace(answers=("x",)), *rows[1:]])
    with pytest.raises(ValueError, match="questions about at least 8 images, got 3"):
        task_of(opened, rows[:3])
    with pytest.raises(ValueError, match=r"a text and images in each.*questions\[1\]"):
        task_of(opened, [rows[0], rows[1]._replace(question=" "), *rows[2:]])
    with pytest.raises(ValueError, match="score: expected exact match, ANLS"):
        task_of(opened, rows, score="anls")
    with pytest.raises(ValueError, match=r"prompt: expected a text with \{question\}"):
        task_of(opened, rows, prompt="What?")
    with pytest.raises(ValueError, match="class_token_only"):
        task_of(opened, rows).candidates(model, class_token_only=True)
    with pytest.raises(TypeError, match=r"multimodal language model .* got a CLIPModel"):
        Answers(rows, model=hf_clip(), processor=processor)
    with pytest.raises(TypeError, match="language model head"):
        Answers(rows, model=model.model, processor=processor)


def test_a_model_that_answers_nothing_rightly_is_refused(opened, files):
    model, _ = opened
    task = task_of(opened, asked(files, ("no such answer",)))
    outputs = task.outputs(model, [1, 2], lambda count: None)
    with pytest.raises(ValueError, match="questions: expected some that the dense model answers"):
        task.measured(Part([1, 2], outputs, outputs))


def test_exact_match_ignores_case_articles_and_punctuation():
    assert exact_match(["two dogs", "cat"], "The 2 dogs.") == 1
    assert exact_match(["two dogs"], "dogs") == 0


@pytest.mark.parametrize(
    ("answers", "predicted", "wanted"),
    [
        (["Paris"], "paris ", 1),
        (["kitten"], "sitting", 1 - 3 / 7),
        (["abc", "abcd"], "abcx", 0.75),
        (["abcd"], "xyzw", 0),
        (["ab"], "a", 0.5),
        (["x"], "", 0),
    ],
)
def test_anls_is_the_similarity_to_the_nearest_answer(answers, predicted, wanted):
    assert anls(answers, predicted) == pytest.approx(wanted)
