"""Classify audio with merged tokens: the Audio Spectrogram Transformer reads patches of sound.

pip install -e ".[models]"
python examples/audio.py
"""

import time

import torch
from transformers import ASTConfig, ASTForAudioClassification

from elip_models import record_stages, reduce_, reduction_summary, unreduce_

BINS, LENGTH = 128, 512  # mel bins, and frames of 10 ms
CONFIG = {
    **{"num_mel_bins": BINS, "max_length": LENGTH, "num_labels": 10},
    **{"hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6},
    **{"intermediate_size": 1536},
}


def tones(batch):
    """Return spectrograms (B, length, bins): silence, and a tone that rises for a second."""
    sound = torch.randn(batch, LENGTH, BINS) * 0.05
    for frame in range(100):
        sound[:, 200 + frame, 20 + frame // 2 : 26 + frame // 2] += 2.0
    return sound


def seconds(model, sound):
    """Return the time of one forward pass."""
    start = time.perf_counter()
    model(sound)
    return time.perf_counter() - start


@torch.no_grad()
def main(repeats=3):
    """Merge half of the tokens of a model with random weights; print what is left and the time."""
    torch.manual_seed(0)
    model, sound = ASTForAudioClassification(ASTConfig(**CONFIG)).eval(), tones(2)
    reduce_(model, keep=0.5)
    print(reduction_summary(model))
    with record_stages(model) as infos:
        model(sound)
    sizes = infos[-1].sizes
    print(f"{sizes.shape[1]} tokens leave the last block, of up to {int(sizes.max())} patches")
    merged = dense = 0.0
    for _ in range(repeats):  # in turns, so that both meet the same machine
        merged += seconds(reduce_(model, keep=0.5), sound)
        dense += seconds(unreduce_(model), sound)
    print(f"time of the reduced model: {merged / dense:.2f} of the dense one's")


if __name__ == "__main__":
    main()
