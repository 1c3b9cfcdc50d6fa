"""Small data and models with known outputs, for the tests of the tasks."""

import numpy as np
import torch
from PIL import Image
from torch import nn

from elip_models.pretraining.data import Example, Sample
from elip_models.pretraining.tasks.task import Loading, Preprocessor, evaluation_transform

LOADING = Loading(batch_size=3)
SIZE = 8


def grey(value):
    return Image.new("RGB", (SIZE, SIZE), (value, value, value))


class Greys:
    """Examples of images with one grey level each."""

    answers = ("dark", "bright")

    def __init__(self, images=1):
        self.images = images

    def __len__(self):
        return 8

    def text_alone(self, index):
        right = self.answers[index % 2]
        return Example((), f"how is {index}", {right: 0.7, "grey": 0.1}, f"g{index}")

    def __getitem__(self, index):
        image = grey(200 if index % 2 else 20)
        return self.text_alone(index)._replace(images=(image,) * self.images)


class Captioned:
    """Images of six grey levels, with two captions each."""

    def __len__(self):
        return 6

    def captions(self, index):
        return (f"grey {index}", f"number {index}")

    def __getitem__(self, index):
        return Sample(grey(40 * index), self.captions(index), f"c{index}")


class Tokens:
    """Tokenizer of the digits in a text."""

    pad_token_id = 0

    def __call__(self, texts, *, max_length, **options):
        ids = torch.zeros(len(texts), max_length, dtype=torch.long)
        for row, text in enumerate(texts):
            for place, digit in enumerate([c for c in text if c.isdigit()][:max_length]):
                ids[row, place] = int(digit) + 1
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


class Config:
    image_size, resize, captions, context_length = SIZE, "squash", "plain", 4
    max_words = 30


class Stub(nn.Module):
    """Model with outputs computed from pixels and digits; its features are constant."""

    ranks = True

    def __init__(self, **config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = type("Config", (Config,), config)
        self.guides = []

    def tokenise(self, tokenizer, texts):
        return tokenizer(texts, max_length=self.config.context_length)

    def logits(self, images, input_ids, attention_mask):
        level = images.flatten(1).mean(1)
        others = getattr(self.config, "num_classes", 2) - 2
        return nn.functional.pad(torch.stack([-level, level], dim=1), (0, others), value=-9.0)

    def rank_answers(self, images, input_ids, attention_mask, answer_ids, answer_mask, k):
        self.asked = answer_ids.shape, k
        return self.logits(images, input_ids, attention_mask).argmax(1)

    def encode_image(self, images, text_cls=None):
        self.guides.append(text_cls)
        return images.flatten(2).transpose(1, 2), None

    def project_image(self, tokens):
        return torch.ones(len(tokens), 2)

    def text_features(self, input_ids, attention_mask):
        return torch.ones(len(input_ids), 2)

    def text_cls(self, input_ids, attention_mask):
        return input_ids[:, :1].float()

    def matching_logits(self, tokens, input_ids, attention_mask):
        levels = torch.linspace(float(self.low), float(self.high), 6)
        return -(tokens.mean((1, 2)) - levels[input_ids[:, 0] - 1]).abs()


def preprocessor(source, **config):
    return Preprocessor(source, pixels, Tokens(), Stub(**config).config, 4)


def pixels(image):
    return torch.tensor(np.asarray(image)).permute(2, 0, 1).float()


def matcher():
    model, source = Stub(), Captioned()
    transform = evaluation_transform(model)
    model.low = transform(source[0].image).mean()
    model.high = transform(source[5].image).mean()
    return model, source
