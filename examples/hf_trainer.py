"""Train a transformers model with its Trainer on half of the patches, and on all in the last steps.

    pip install -e ".[train]"
    python examples/hf_trainer.py

FLIP trains this way: it drops patches at random, then trains briefly on whole images. A run that
resumes from a checkpoint continues with the reduction of its step.
"""

import tempfile

import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from elip_models import PatchDropout
from elip_models.integrations.hf_trainer import ReductionCallback


def squares(size):
    """Return samples of noise with a red, green or blue square, and its colour as label."""
    images = torch.randn(size, 3, 64, 64)
    for i, image in enumerate(images):
        top, left = torch.randint(0, 40, (2,)).tolist()
        image[i % 3, top : top + 24, left : left + 24] += 2.0
    return [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(images)]


def main(steps=20):
    """Train, and print the tokens of each step and the accuracy."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 3}
    config = ViTConfig(image_size=64, patch_size=8, num_hidden_layers=6, num_labels=3, **sizes)
    model = ViTForImageClassification(config)
    tokens = []  # the number that enters the last block, in each step
    model.vit.layers[-1].register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    options = {"per_device_train_batch_size": 32, "use_cpu": True, "report_to": "none"}
    trainer = Trainer(
        model,
        TrainingArguments(tempfile.mkdtemp(), max_steps=steps, learning_rate=1e-3, **options),
        train_dataset=squares(512),
        eval_dataset=squares(64),
        compute_metrics=lambda out: {"right": (out.predictions.argmax(1) == out.label_ids).mean()},
        callbacks=[ReductionCallback(PatchDropout(0.5), until=0.8)],  # the only added line
    )
    trainer.train()
    print(f"tokens by step: {tokens}")
    print(f"{trainer.evaluate()['eval_right']:.0%} of the colours right")


if __name__ == "__main__":
    main()
