"""Pictures of a reduction: surviving patches and scores by stage; concentration of CLS attention.

    map_s       = source map of stage s after that of all stages before      (B, T, N0)
    alive_s     = patches that are a token of their own after stage s        (B, P)
    heat_s(n)   = the score, at stage s, of the token that contains patch n  (B, P)
    mass_l(x)   = share of the CLS attention on the top x of the patches, layer l, dense

Merged tokens are traced back through every stage (`source_map` of the info).
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from elip_kernels import unmerge
from elip_models.analysis.chart_style import write_figure
from elip_models.engine.forward_state import ForwardState
from elip_models.strategies import Dense
from elip_models.strategies.strategy import StageInfo, Strategy
from elip_models.towers import Tower
from elip_models.validation import require_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIM, GREY = 0.15, 0.45  # weight of a dropped patch's own colour, and the grey mixed with it
SHARES = (0.05, 0.10, 0.25, 0.50)
"""Shares of the patches whose attention `concentration` sums."""
MAX_CAPTION = 200  # characters
NOTE = (
    "Grey: dropped or merged. Scores: from dark (lowest of the image) to bright (highest), by "
    "square root; patches of a merged token have its score, dropped patches are blank."
)


def surviving_patches(infos: Sequence[StageInfo], num_patches: int) -> list[Tensor]:
    """Return for each stage (B, num_patches) bool: the patches that are still separate tokens."""
    survivors = []
    for source in source_maps(infos, num_patches)[1:]:
        alone = source & (source.sum(2, keepdim=True) == 1)
        survivors.append(alone.any(1))
    return survivors


def attention_maps(infos: Sequence[StageInfo], num_patches: int) -> list[Tensor]:
    """Return for each stage (B, num_patches): the score of each patch's token before the stage.

    It is NaN for a patch that was dropped without merging.
    """
    maps = []
    for info, source in zip(infos, source_maps(infos, num_patches)[:-1], strict=True):
        heat = unmerge(info.attention[..., None], source)[..., 0]
        maps.append(heat.masked_fill(~source.any(1), float("nan")))
    return maps


def source_maps(infos: Sequence[StageInfo], num_patches: int) -> list[Tensor]:
    """Return the patches of each token (B, T, num_patches) bool, before and after each stage.

    The list starts with the map before the first stage. Without stages it has one empty tensor.
    """
    if not infos:
        return [torch.empty(0, dtype=torch.bool)]
    first = infos[0].reduction.source_map()
    B, _, N = first.shape
    source = torch.eye(N, dtype=torch.bool, device=first.device).expand(B, -1, -1)
    sources = [source[..., N - num_patches :]]
    for info in infos:
        sources.append(info.reduction.source_map(sources[-1]))
    return sources


@torch.no_grad()
def concentration(tower: Tower, images: Tensor, shares: Sequence[float] = SHARES) -> Tensor:
    """Return how much of the CLS attention falls on a few patches in each layer of the dense tower.

    The attention is averaged over heads and over the normalised images (B, 3, H, W), and sums to 1
    over the patches. The result is (depth, len(shares)).
    """
    counts = [max(1, round(share * tower.num_patches)) for share in shares]
    tower = tower.resized_for(images)
    forward, tokens, masses = ForwardState(tower, Dense()), tower.embed(images), []
    for i in range(tower.depth):
        row = tower.cls_attention(i, tokens, tokens[:, 0])[:, tower.num_prefix_tokens :]
        mass = row.sort(dim=1, descending=True).values.cumsum(1) / row.sum(1, keepdim=True)
        masses.append(mass.mean(0)[[count - 1 for count in counts]])
        tokens, _ = forward.run_block(i, tokens)
    return torch.stack(masses)


def patch_grid(tower: Tower, strategy: Strategy | None = None) -> tuple[int, int]:
    """Return rows and columns of the patches that enter block 0, each as square as possible.

    Those of a clip are of one step in time. `strategy` may make the image smaller.
    """
    num_patches, image_size = tower.num_patches, tower.image_size
    if strategy is not None:
        size = strategy.resized(tower.size)
        num_patches, image_size = size.num_patches, size.image
    return grid_shape(num_patches // tower.num_steps, image_size)


def grid_shape(num_patches: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """Return rows and columns of the patches of an image (H, W), each as square as possible."""
    (height, width), P = image_size, num_patches
    rows = (rows for rows in range(1, P + 1) if P % rows == 0)
    best = min(rows, key=lambda rows: abs(rows * width - P // rows * height))
    return best, P // best


class Panel(NamedTuple):
    """A picture (H, W, 3), or scores (H, W) with NaN for none, and a line below it."""

    picture: Tensor
    below: str = ""


def draw_panels(
    rows: Sequence[Sequence[Panel]],
    captions: Sequence[str],
    path: Path,
    *,
    titles: Sequence[str],
    title: str,
    note: str,
) -> Path:
    """Write a PNG with rows of panels, each with a caption at its end.

    `titles` are above the first row, `title` above all and `note` below all.
    """
    height, width = rows[0][0].picture.shape[:2]
    columns, wide = len(rows[0]), width / height
    figure = new_figure(1.7 * wide * columns + 2.4, 1.85 * len(rows) + 0.9)
    widths = [wide] * columns + [1.3]
    axes = figure.subplots(len(rows), columns + 1, squeeze=False, width_ratios=widths)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, panels, caption in zip(axes, rows, captions, strict=True):
        for axis, panel in zip(row[:-1], panels, strict=True):
            axis.imshow(panel.picture.numpy(), cmap="inferno", extent=(0, width, height, 0))
            place = {"ha": "center", "va": "top", "transform": axis.transAxes}
            axis.text(0.5, -0.03, panel.below, fontsize=7, **place)
        text = textwrap.fill(textwrap.shorten(caption, MAX_CAPTION, placeholder=" .."), 26)
        row[-1].text(0.0, 0.5, text, fontsize=9, va="center", parse_math=False)
    for axis, text in zip(axes[0, :-1], titles, strict=True):
        axis.set_title(text, fontsize=9)
    inches = figure.get_figwidth()
    title = "\n".join(textwrap.fill(line, int(12 * inches)) for line in title.splitlines())
    figure.suptitle(title, fontsize=10, parse_math=False)
    figure.supxlabel(textwrap.fill(note, int(16 * inches)), fontsize=8)
    write_figure(figure, path, dpi=130)
    return path


def draw_reduction(
    images: Tensor,
    captions: Sequence[str],
    infos: Sequence[StageInfo],
    path: Path,
    *,
    grid: tuple[int, int],
    title: str = "",
) -> Path:
    """Write a PNG with one row for each image: input, kept patches and scores by stage, caption.

    The images are (B, 3, H, W) in [0, 1], `grid` has the rows and columns of the patches.
    """
    num_patches = grid[0] * grid[1]
    survivors = surviving_patches(infos, num_patches)
    heats = attention_maps(infos, num_patches)
    rows, titles = [], ["image"]
    for info in infos:
        titles += [f"before layer {info.stage.first + 1}:\n{info.stage.keep} kept", "scores"]
    for b, image in enumerate(images.cpu()):
        row = [Panel(image.permute(1, 2, 0))]
        for alive, heat, info in zip(survivors, heats, infos, strict=True):
            scores = (heat[b] * info.attention.shape[1]).view(grid).cpu().float().clamp(min=0)
            known = scores[~scores.isnan()].tolist() or [float("nan")]
            below = f"{min(known):.2f} to {max(known):.2f} times uniform"
            kept = dimmed(image, alive[b].view(grid))
            row += [Panel(kept.permute(1, 2, 0)), Panel(scores.sqrt(), below)]
        rows.append(row)
    return draw_panels(rows, captions, path, titles=titles, title=title, note=NOTE)


def draw_concentration(masses: Tensor, path: Path, *, title: str) -> Path:
    """Write a PNG of `concentration`: a curve over the layers for each of `SHARES`.

    Dotted lines are the values of uniform attention.
    """
    figure = new_figure(6.4, 4.0)
    axis = figure.subplots()
    layers = range(1, len(masses) + 1)
    for share, mass in zip(SHARES, masses.cpu().T.tolist(), strict=True):
        (line,) = axis.plot(layers, mass, marker="o", ms=3, label=f"top {share:.0%}")
        axis.axhline(share, color=line.get_color(), ls=":", lw=1)
    axis.set(xlabel="layer of the dense tower", xticks=layers, ylim=(0, 1))
    axis.set_ylabel("share of the CLS attention on patches")
    axis.legend(title="of the patches\n(dotted: uniform)", fontsize=8, title_fontsize=8)
    axis.set_title(title, fontsize=9, parse_math=False)
    write_figure(figure, path, dpi=130)
    return path


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty matplotlib figure, sizes in inches."""
    with require_extra("elip_models.analysis.visualize"):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def dimmed(image: Tensor, alive: Tensor) -> Tensor:
    """Return the image (3, H, W), almost grey at patches where `alive` (rows, columns) is False."""
    alive = alive.cpu()[None, None].float()
    mask = F.interpolate(alive, size=image.shape[1:], mode="nearest")[0] > 0
    return torch.where(mask, image, (1 - DIM) * GREY + DIM * image)
