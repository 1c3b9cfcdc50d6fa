"""Write a strategy: keep the patches whose tokens have the largest norm, merge the others.

pip install -e ".[models]"
python examples/own_strategy.py
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import timm
import torch

from elip_models import Stage, StageInfo, Strategy, TokenCounts, encode_image, reduce_


@dataclass(frozen=True)
class Longest(Strategy):
    """Before block `first`, keep a share of the patches by the norm of their tokens."""

    name: ClassVar[str] = "longest"
    keep_field: ClassVar[str] = "keep_ratio"  # what reduce_(keep=..) sets
    merge: ClassVar[str] = "one"  # the patches that are not kept become one token
    keep_ratio: float = 0.5
    first: int = 1

    def stages(self, size):
        """Return where it acts, and how many patches stay."""
        keep = max(1, int(self.keep_ratio * size.num_patches))
        return (Stage(self.first, size.depth - self.first, keep),) if self.keep_ratio < 1 else ()

    def token_counts(self, size):
        """Return the tokens in each block, from which FLOPs follow."""
        counts = [size.num_tokens] * size.depth
        for stage in self.stages(size):
            left = size.num_prefix_tokens + stage.keep + 1  # the merged token is the last
            counts[stage.first :] = [min(left, size.num_tokens)] * stage.layers
        return tuple(TokenCounts(n, n) for n in counts)

    def step(self, tower, stage, tokens, context):
        """Reduce tokens (B, N, D) to (B, p + keep + 1, D), p prefix tokens first."""
        scores = tokens.detach().norm(dim=2) if context.replay is None else context.replay.attention
        tokens, reduction = tower.reduce(tokens, scores, stage.keep, merge="one")
        return tokens, StageInfo(stage, reduction, scores)

    def at_strength(self, size, strength):
        """Return the strategy from strength 0 (drops nothing) to 1 (keeps one patch)."""
        return replace(self, keep_ratio=1 - strength * (1 - 1 / size.num_patches))


def main():
    """Run the strategy in both ways: `encode_image` and `reduce_`."""
    model, images = timm.create_model("vit_tiny_patch16_224").eval(), torch.randn(2, 3, 224, 224)
    tokens, infos = encode_image(model, images, strategy=Longest(), return_info=True)
    print(f"{tokens.shape[1]} of 197 tokens; kept: {infos[0].reduction.kept[0, :8].tolist()} ..")
    strategy = Longest().at_keep(model, 0.7)  # what reduce_(model, Longest(), keep=0.7) takes
    print(strategy, f"logits {tuple(reduce_(model, strategy)(images).shape)}")


if __name__ == "__main__":
    main()
