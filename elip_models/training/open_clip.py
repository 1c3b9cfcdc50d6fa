"""open_clip's own training script, with the image tower of its model reduced.

    python -m elip_models.open_clip_train --reduce keep=0.7 --model ViT-B-16 --train-data a.csv ..
    torchrun --nproc-per-node 4 -m elip_models.open_clip_train --reduce tome:r=8 --model ..

All other arguments are `open_clip_train.main`'s, and pass on. It has no hook between making a model
and training it. So its `main` runs as it is, but with another global of one name: the
`create_model_and_transforms` that it calls also reduces the model that it makes. Nothing of
open_clip is changed, neither its files nor its modules. Checkpoints are open_clip's; how they were
reduced stands in its log alone, and `--reduce` is given again where training resumes.
"""

import argparse
import logging
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

from torch import nn

from elip_models.reduction.patch import reduce_
from elip_models.reduction.strategy import Strategy
from elip_models.reduction.strategy_spec import get_strategy

CREATE = "create_model_and_transforms"
LEAK = (
    "--val-data: expected none where the caption guides the image: open_clip encodes each image "
    "with its own caption there, which would tell the ranking whose it is; take elip:fusion=1.0, a "
    "strategy without text such as tome, or --imagenet-val"
)


def main(arguments: Sequence[str]) -> int | None:
    """Train as open_clip does; returns what its `main` returns, -1 where that refuses to run.

    Raises:
        SystemExit: arguments that cannot be used, with the reason.
        TypeError: a model that cannot be reduced, with the reason.
        ImportError: open_clip's training needs the extra `open-clip-train`.
    """
    parser = argparse.ArgumentParser(
        prog="elip_models.open_clip_train",
        description="open_clip's training script with a reduced image tower; all other arguments "
        "are those of python -m open_clip_train.main",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--reduce", required=True, nargs="+", metavar="R", help="tome:r=8, keep=0.7, or both"
    )
    known, others = parser.parse_known_args(arguments)
    try:
        strategy, options = parse_reduce(known.reduce)
    except (TypeError, ValueError) as error:
        parser.error(f"--reduce: {error}")
    try:
        from open_clip_train import main as script
    except ImportError as error:
        raise ImportError(
            f"open_clip's training needs {error.name}: pip install 'elip-kernels[open-clip-train]'"
        ) from error
    if script.parse_args(others).val_data is not None and strategy.is_guided:
        parser.error(LEAK)
    run = with_globals(script.main, **{CREATE: reducing_first(getattr(script, CREATE), options)})
    return run(others)


def parse_reduce(words: Sequence[str]) -> tuple[Strategy, dict[str, Any]]:
    """['tome:r=8'], ['keep=0.7'] or both -> the strategy, and what to call `reduce_` with.

    Raises:
        TypeError, ValueError: another strategy, setting or word.
    """
    shares = [word for word in words if word.startswith("keep=")]
    names = [word for word in words if word not in shares] or ["tome"]
    if len(names) > 1 or len(shares) > 1:
        raise ValueError(f"expected one strategy and one keep=SHARE, got {' '.join(words)!r}")
    options: dict[str, Any] = {"strategy": names[0]}
    if shares:
        share = shares[0].removeprefix("keep=")
        try:
            options["keep"] = float(share)
        except ValueError:
            raise ValueError(f"keep: expected a number in (0, 1], got {share!r}") from None
    return get_strategy(names[0]), options


def with_globals(function: FunctionType, **names: Any) -> Callable[..., Any]:
    """The same function, which finds `names` among its globals; its module is left alone.

    Raises:
        TypeError: a function that reads none of these names.
    """
    unread = names.keys() - set(function.__code__.co_names)
    if unread:
        raise TypeError(
            f"{function.__module__}.{function.__name__}: expected a function that calls "
            f"{', '.join(sorted(unread))}, as in open_clip_torch 3.0 to 3.3, got another"
        )
    return FunctionType(function.__code__, function.__globals__ | names)


def reducing_first(create: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """`create`, the first model of which is reduced: the next is a teacher, and stays dense."""
    made: list[nn.Module] = []

    def create_reduced(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        model, *transforms = create(*args, **kwargs)
        if not made:
            reduce_(model, **options)
            logging.info("Image tower reduced: %s", options)
        made.append(model)
        return model, *transforms

    return create_reduced
