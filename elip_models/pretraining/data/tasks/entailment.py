"""EmojiEntailment: visual entailment on emoji scenes.

    there are exactly two dogs on the left
    the dog is to the left of the fox

A dark rectangle hides one place of every image. A hypothesis is entailed if the image shows it,
contradicted if the image shows otherwise, and neutral if the deciding place is hidden. Each
hypothesis appears once with each label, so neither the text nor the rectangle alone predicts the
label.
"""

from elip_models.pretraining.data.scene_captions import at_place, in_words
from elip_models.pretraining.data.scene_sampling import COUNTS, NAMES, Scene, hide_group
from elip_models.pretraining.data.tasks.emoji_examples import EmojiExamples, ExampleSampler

LABELS = ("entailment", "neutral", "contradiction")
Hypothesis = tuple[str, str, tuple[Scene]]


def _placed(sampler: ExampleSampler) -> Hypothesis:
    (name,), place, label = sampler.names(1), sampler.place(), sampler.answer(LABELS)
    count = 1 if sampler.clutter else sampler.text.choice(list(COUNTS))
    names, shown = [name], count
    if label == "neutral":
        names = []
    elif label == "contradiction":  # another number, or another emoji there
        if not sampler.clutter and sampler.rng.random() < 0.5:
            shown = sampler.another(list(COUNTS), count)
        else:
            names = [sampler.another(NAMES, name), *[name] * sampler.rng.randint(0, 1)]
    scene = sampler.scene(names=names, absent=[name], counts=[shown], place=place)
    scene = hide_group(scene, 0 if label == "neutral" else len(scene.groups) - 1)
    verb = "is" if count == 1 else "are"
    text = f"there {verb} exactly {in_words(count, name)} {at_place(place)}"
    return text, label, (scene,)


def _related(sampler: ExampleSampler) -> Hypothesis:
    names, side, label = sampler.names(2), sampler.side(), sampler.answer(LABELS)
    text = f"the {names[0]} is {side} the {names[1]}"
    scene = sampler.related(names[::-1] if label == "contradiction" else names, side, numbers=[3])
    return text, label, (hide_group(scene, sampler.rng.randint(0, 1) if label == "neutral" else 2),)


class EmojiEntailment(EmojiExamples):
    """Hypotheses about images with three labels; labels and forms are balanced."""

    name = "emoji_entailment"
    answers = LABELS
    forms = (_placed, _related)
    turns = len(LABELS)
