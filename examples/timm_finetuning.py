"""Fine-tune a timm model on 70% of its tokens, with timm's optimizer and loader.

    pip install -e ".[models]"
    python examples/timm_finetuning.py

timm's own train.py finds the registered model:
    python -c "import runpy, timm_finetuning; runpy.run_path('train.py', run_name='__main__')" ..
"""

import numpy as np
import timm
import torch
from PIL import Image
from timm import data, optim

import elip_models


@timm.models.register_model
def reduced_vit_tiny(pretrained=False, **options):
    """Return a tiny ViT that is reduced."""
    model = timm.create_model("vit_tiny_patch16_224", pretrained=pretrained, **options)
    return elip_models.reduce_(model, keep=0.7)  # the only added line


class Squares(torch.utils.data.Dataset):
    """Noise with a red, green or blue square; timm's loader sets `transform`."""

    def __len__(self):
        return 256

    def __getitem__(self, i):
        random = np.random.default_rng(i)
        pixels = random.integers(0, 128, (64, 64, 3), dtype=np.uint8)
        y, x = random.integers(0, 40, 2)
        pixels[y : y + 24, x : x + 24, i % 3] += 127
        return self.transform(Image.fromarray(pixels)), i % 3


def main(epochs=2):
    """Train, and print the accuracy of each epoch."""
    torch.manual_seed(0)
    model = timm.create_model("reduced_vit_tiny", img_size=64, patch_size=8, depth=6, num_classes=3)
    print(elip_models.reduction_summary(model))
    options = {"is_training": True, "no_aug": True, "use_prefetcher": False, "num_workers": 0}
    loader = data.create_loader(Squares(), 64, batch_size=32, **options)
    optimizer = optim.create_optimizer_v2(model, opt="adamw", lr=1e-3)
    for epoch in range(epochs):
        right = 0
        for images, labels in loader:
            logits = model(images)
            torch.nn.functional.cross_entropy(logits, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            right += (logits.argmax(1) == labels).sum().item()
        print(f"epoch {epoch}: {right / 256:.0%} of the colours right")


if __name__ == "__main__":
    main()
