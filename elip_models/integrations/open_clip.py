"""open_clip's own training script, with a reduced image tower.

    python -m elip_models.open_clip_train --reduce keep=0.7 --model ViT-B-16 --train-data a.csv ..
    torchrun --nproc-per-node 4 -m elip_models.open_clip_train --reduce tome:r=8 --model ..

All other arguments go to `open_clip_train.main`, which has no hook between creating a model and
training it. Therefore the script is loaded as a module of its own, whose
`create_model_and_transforms` also reduces the model. The modules that other code imports are not
changed. Checkpoints have open_clip's format. Only the log contains the reduction, so `--reduce` has
to be given again when training resumes.
"""

import argparse
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

from torch import nn

from elip_models.api import guidance, reduce_
from elip_models.engine.install import reduction_of
from elip_models.strategies import DEFAULT
from elip_models.strategies.spec import check_keep, get_strategy
from elip_models.strategies.strategy import Strategy
from elip_models.validation import install_command

SCRIPT, CREATE = "open_clip_train.main", "create_model_and_transforms"
TESTED = ("3.0", "3.3")
"""The first and the last release of open_clip_torch with which its script was run."""
OTHER_SCRIPT = (
    f"{SCRIPT}: expected a script that creates its model by {CREATE}, got another; install "
    f"open_clip_torch {TESTED[0]} to {TESTED[1]}, with which this was tested"
)
GUIDED_VALIDATION_ERROR = (
    "--val-data: expected none with a strategy that the caption guides: open_clip encodes each "
    "image with its own caption there, which leaks the right answer into the ranking; use "
    "elip:fusion=1.0, a strategy without text such as tome, or --imagenet-val"
)


def main(arguments: Sequence[str]) -> int | None:
    """Train as open_clip does and return what its `main` returns, -1 if that does not run.

    Invalid arguments raise SystemExit. A model that cannot be reduced, and a release of open_clip
    whose script does not call `create_model_and_transforms`, raise TypeError.
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
        script = load_script()
    except ImportError as error:
        raise ImportError(
            f"open_clip's training needs {error.name}: {install_command('open-clip-train')}"
        ) from error
    if script.parse_args(others).val_data is not None and strategy.is_guided:
        parser.error(GUIDED_VALIDATION_ERROR)
    with ExitStack() as stack:
        create = ReduceFirstModel(getattr(script, CREATE), options, stack)
        setattr(script, CREATE, create)
        code = script.main(others)
    if code is None and not create.made:
        raise TypeError(OTHER_SCRIPT)
    return code


def load_script() -> ModuleType:
    """Return a module of open_clip's script that no other code imports."""
    spec = find_spec(SCRIPT)
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    if not hasattr(script, CREATE):
        raise TypeError(OTHER_SCRIPT)
    return script


def parse_reduce(words: Sequence[str]) -> tuple[Strategy, dict[str, Any]]:
    """Parse ['tome:r=8'], ['keep=0.7'] or both to a strategy and the arguments of `reduce_`."""
    shares = [word for word in words if word.startswith("keep=")]
    names = [word for word in words if word not in shares] or [DEFAULT.name]
    if len(names) > 1 or len(shares) > 1:
        raise ValueError(f"expected one strategy and one keep=SHARE, got {' '.join(words)!r}")
    options: dict[str, Any] = {"strategy": names[0]}
    if shares:
        share = shares[0].removeprefix("keep=")
        try:
            options["keep"] = float(share)
        except ValueError:
            raise ValueError(f"keep: expected a number in (0, 1], got {share!r}") from None
    strategy = get_strategy(names[0])
    check_keep(names[0], {}, options.get("keep"))
    return strategy, options


class ReduceFirstModel:
    """A function like `create` whose first model is reduced; the next one, a teacher, stays dense.

    Until `stack` ends, each caption guides its own image, if the strategy reads a text.
    """

    def __init__(
        self, create: Callable[..., Any], options: dict[str, Any], stack: ExitStack
    ) -> None:
        self.create = create
        self.options = options
        self.stack = stack
        self.made: list[nn.Module] = []

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Create a model and its transforms."""
        model, *transforms = self.create(*args, **kwargs)
        if not self.made:
            reduction = reduction_of(reduce_(model, **self.options))
            if reduction.strategy.is_guided and reduction.image_text is not None:
                self.stack.enter_context(guidance(model, paired=True))
            logging.info("Image tower reduced: %s", self.options)
        self.made.append(model)
        return model, *transforms
