"""Classify a video with merged tokens: ViViT merges over space and time.

pip install -e ".[models]"
python examples/video.py
"""

import time

import torch
from transformers import VivitConfig, VivitForVideoClassification

from elip_models import record_stages, reduce_, reduction_summary, unreduce_

FRAMES, SIDE = 16, 112
CONFIG = {
    **{"num_frames": FRAMES, "image_size": SIDE, "tubelet_size": [2, 16, 16]},
    **{"hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6},
    **{"intermediate_size": 1536, "num_labels": 10},
}


def moving_square(batch):
    """Return videos (B, frames, 3, H, W) of a square that moves over still noise."""
    videos = torch.randn(batch, 1, 3, SIDE, SIDE).repeat(1, FRAMES, 1, 1, 1) * 0.1
    for frame in range(FRAMES):
        left = frame * (SIDE - 32) // FRAMES
        videos[:, frame, :, 40:72, left : left + 32] += 1.0
    return videos


def seconds(model, videos):
    """Return the time of one forward pass."""
    start = time.perf_counter()
    model(videos)
    return time.perf_counter() - start


@torch.no_grad()
def main(repeats=3):
    """Merge half of the tokens of a model with random weights; print what is left and the time."""
    torch.manual_seed(0)
    model, videos = VivitForVideoClassification(VivitConfig(**CONFIG)).eval(), moving_square(2)
    reduce_(model, keep=0.5)
    print(reduction_summary(model))
    with record_stages(model) as infos:
        model(videos)
    sizes = infos[-1].sizes
    print(f"{sizes.shape[1]} tokens leave the last block, of up to {int(sizes.max())} patches")
    merged = dense = 0.0
    for _ in range(repeats):  # in turns, so that both meet the same machine
        merged += seconds(reduce_(model, keep=0.5), videos)
        dense += seconds(unreduce_(model), videos)
    print(f"time of the reduced model: {merged / dense:.2f} of the dense one's")


if __name__ == "__main__":
    main()
