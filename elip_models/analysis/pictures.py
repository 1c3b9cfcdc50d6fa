"""The pictures of `elip visualize`."""

from pathlib import Path

from elip_models.analysis.merging import draw_clips, draw_merging
from elip_models.analysis.visualize import (
    concentration,
    draw_concentration,
    draw_reduction,
    patch_grid,
)
from elip_models.analysis.visualize_inputs import CaptionedImages, VisualizedModel
from elip_models.user_warnings import SlowScorerWarning, ignoring
from elip_models.validation import ConfigError


def draw_pictures(model: VisualizedModel, shown: CaptionedImages, path: Path) -> list[Path]:
    """Reduce images, guided by their captions if the strategy uses text; return the pictures.

    `path` is from `draw_reduction` if the strategy has scores; NAME_merged.png beside it, or `path`
    without scores, is from `draw_merging`. A tower with CLS adds NAME_concentration.png, averaged
    over these images. A video model has one picture, of `draw_clips`. A strategy that reduces
    nothing in inference raises ConfigError, as do images without captions if a text guides.
    """
    captions, tower = [caption for _, caption in shown], model.tower
    if model.guide is not None and not any(captions):
        raise ConfigError(
            f"--caption: expected one for each --image, {len(captions)}, got none; --strategy tome "
            "needs none"
        )
    pixels = model.pixels([image for image, _ in shown])
    images = model.normalised(pixels)
    with ignoring(SlowScorerWarning):
        infos = model.stage_infos(images, captions)
    if not infos:
        raise ConfigError(
            f"--strategy: expected one that merges or drops tokens in inference, got "
            f"{model.strategy.name!r}"
        )
    if tower.num_frames > 1:
        grid = (tower.num_steps, *patch_grid(tower))
        return [draw_clips(pixels, captions, infos, path, grid=grid, title=str(model))]
    paths, merged = [], path
    layout = {"grid": patch_grid(tower, model.strategy), "title": str(model)}
    if all(info.attention is not None for info in infos):
        paths.append(draw_reduction(pixels, captions, infos, path, **layout))
        merged = path.with_stem(f"{path.stem}_merged")
    paths.append(draw_merging(pixels, captions, infos, merged, **layout))
    if tower.has_cls:
        second = path.with_stem(f"{path.stem}_concentration")
        what = f"CLS attention of the dense tower, heads averaged, {len(shown)} images"
        masses, title = concentration(tower, images), f"{model.name}\n{what}"
        paths.append(draw_concentration(masses, second, title=title))
    return paths
