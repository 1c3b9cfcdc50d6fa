"""Saving and loading of reduced models: the library's own files, and the settings of `reduce_`.

    timm           config.json, model.safetensors                       elip.json
    open_clip      open_clip_config.json, open_clip_model.safetensors   elip.json
    transformers   what its save_pretrained writes; "elip" in config.json
    peft           the adapter, as its save_pretrained writes it        elip.json
    ours           what save_pretrained writes; fields of config.json

Each library can load its folder without this one; the model is dense then. A save replaces an
earlier one as one event, see `saved_folder`.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from elip_models.api import reduce_, restore_
from elip_models.engine.hf_config import LANGUAGE_MODEL, store_in_config
from elip_models.engine.install import reduction_of
from elip_models.engine.reduction import Reduction
from elip_models.saving.dense_models import (
    ADAPTER,
    CONFIG,
    OPEN_CLIP_CONFIG,
    class_in,
    load_open_clip,
    load_timm,
    load_transformers,
    make_open_clip,
)
from elip_models.saving.files import read_config, read_object, write_file, write_json, write_tensors
from elip_models.saving.hub import CARD, card_values, fetch_folder
from elip_models.saving.meta_build import check_config, library_errors, outline_of, quiet_logs
from elip_models.saving.model_registry import source_of_family
from elip_models.saving.saved_folder import README, saved_folder
from elip_models.strategies.dense import Dense
from elip_models.strategies.serialization import settings_of, strategy_of
from elip_models.strategies.strategy import Strategy
from elip_models.towers import SelfReducingModel, library_of, without_adapter
from elip_models.validation import as_config_error, check
from elip_models.vlm.passed_model import passed_model

SETTINGS = "elip.json"
Config = str | dict[str, Any] | None


def save_reduced(model: nn.Module, folder: str | os.PathLike, *, config: Config = None) -> Path:
    """Save a reduced model in the format of its library, together with its reduction.

    The library alone can load the folder as a dense model. For a PEFT model only the adapter is
    saved, as peft does; `PeftModel.from_pretrained(base, folder)` returns a dense model, which
    `load_reduced(folder, model)` reduces.

    Example::

        elip_models.save_reduced(elip_models.reduce_(model), "vit_tome")
        model = elip_models.load_reduced("vit_tome")

    Args:
        model: a model of `reduce_`, a model that contains one, or one of our models with a
            reduction in its config. torch.compile and DistributedDataParallel may wrap it.
        folder: created if necessary. An earlier save in it, of any library, is replaced as a whole:
            after a kill or an error the folder is the old one or the new one. Other files stay,
            such as a tokenizer, and so does a README.md that was edited.
        config: for open_clip, the name of the model, such as "ViT-B-16", or its `model_cfg`, which
            open_clip does not store. For timm, further arguments of its model.

    Returns:
        The folder.

    Raises:
        TypeError: the model is sharded, or of another library.
        ValueError: the model is not reduced or cannot be saved, `config` is missing or wrong, or
            `folder` has an earlier save and is a mount point, contains the current directory, or
            is in a folder that cannot be written.
    """
    check("model", model, nn.Module)
    check("folder", folder, str | os.PathLike)
    model, folder = _unwrap(model), Path(folder)
    if isinstance(model, SelfReducingModel):
        _check_reduces(model)
        return model.save_pretrained(folder)
    if LANGUAGE_MODEL in (getattr(getattr(model, "config", None), "elip", None) or ()):
        if without_adapter(model) is not model:
            raise ValueError(
                "model: expected a language model without an adapter, whose files have no place "
                "for its strategy, got one of peft; save it by its save_pretrained, and call "
                "reduce_ after loading"
            )
        with saved_folder(folder) as new:
            model.save_pretrained(new)
        return folder
    reduction, module = _reduction_in(model)
    is_adapter = without_adapter(model) is not model
    library = "peft" if is_adapter else library_of(model)
    if library not in WRITERS:
        raise TypeError(
            f"model: expected one of {', '.join(WRITERS)}, got {type(model).__name__}; save the "
            "reduced model inside it"
        )
    store_in_config(reduction)
    with saved_folder(folder) as new:
        WRITERS[library](model, new, config)
        if library != "transformers" or module:
            write_json(new / SETTINGS, {"module": module, **settings_of(reduction.strategy)})
        if not (new / README).exists():
            write_file(new / README, _card(reduction, library, folder).encode())
    return folder


def load_reduced(
    folder: str | os.PathLike,
    model: nn.Module | None = None,
    *,
    strategy: str | Strategy | None = None,
) -> nn.Module:
    """Load a model that `save_reduced` wrote, with its reduction.

    Args:
        folder: a folder, or 'owner/name' of a repository of the hub.
        model: a model that its library loaded from the folder; it is reduced in place. Pass it to
            use options of the library, a class of your own, or an adapter of peft.
        strategy: replaces the saved strategy, as in `reduce_`. Required for a class of your own.

    Returns:
        The model, in eval mode unless `model` was passed.

    Raises:
        FileNotFoundError: the folder is missing, or contains no reduced model.
        ConfigError: the settings are invalid or do not fit the model; names file and key.
        TypeError: `model` or `folder` has another type.
        ValueError: the library of the folder is unknown, a file is damaged, a tensor is missing or
            not finite, or the model needs code or towers from elsewhere; pass it as `model` then.
    """
    check("model", model, nn.Module | None)
    folder = fetch_folder(folder)
    if model is None:
        _check_is_reduced(folder)
        model = _open_dense(folder)
    if isinstance(model, SelfReducingModel):
        _check_reduces(model)
        if strategy is not None:
            raise ValueError(
                f"strategy: expected None for a {type(model).__name__}, whose config has it, got "
                f"{strategy!r}; change fields of the config, create_model('hf:..', schedule=..)"
            )
        return model
    saved, where = _read_settings(folder)
    if strategy is None and isinstance(saved, dict) and LANGUAGE_MODEL in saved:
        with as_config_error(where):
            restore_(model, saved)
        return model
    with as_config_error(where):
        module = saved.pop("module", "") if isinstance(saved, dict) else ""
        try:
            reduced = without_adapter(model).get_submodule(module) if module else model
        except (AttributeError, TypeError) as error:
            raise ValueError(
                f"module: expected the name of a module in {type(model).__name__}, got {module!r}"
            ) from error
        if strategy is None:
            reduce_(reduced, strategy=strategy_of(saved))
            return model
    reduce_(reduced, strategy=strategy)
    return model


def is_saved_reduction(folder: Path) -> bool:
    """Return whether `save_reduced` wrote a folder of another library's model."""
    if (folder / SETTINGS).is_file():
        return True
    if not (folder / CONFIG).is_file():
        return False
    config = read_object(folder / CONFIG)
    return "elip" in config and source_of_family(config.get("model")) is None


def _unwrap(model: nn.Module) -> nn.Module:
    if isinstance(model, torch._dynamo.OptimizedModule):
        return _unwrap(model._orig_mod)
    if isinstance(model, DistributedDataParallel):
        return _unwrap(model.module)
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise TypeError(
            "model: expected an unsharded model, got a sharded one; load "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) into an "
            "unsharded one, and save that"
        )
    return model


def _check_reduces(model: SelfReducingModel) -> None:
    if isinstance(model.config.reduction, Dense):
        raise ValueError(
            f"model: expected a reduction in its config, got a dense {type(model).__name__}; use "
            "save_pretrained and from_pretrained"
        )


def _check_is_reduced(folder: Path) -> None:
    """Raise an error if a folder has a dense model; no weights are read."""
    config = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    source = source_of_family(config.get("model"))
    if source is not None:
        family, values = read_config(folder)
        with as_config_error(str(folder / CONFIG)):
            outline = outline_of(lambda: source.from_config(family, values))
        _check_reduces(outline)
    elif config or (folder / OPEN_CLIP_CONFIG).is_file():
        _read_settings(folder)


def _reduction_in(model: nn.Module) -> tuple[Reduction, str]:
    reduction = reduction_of(passed_model(model))
    if reduction is None:
        raise ValueError(
            "model: expected one model of reduce_, got no reductions in it; save a dense model by "
            "its library"
        )
    owner = reduction.model
    names = {id(module): name for name, module in without_adapter(model).named_modules()}
    if id(owner) not in names:
        raise ValueError(
            f"model: expected the whole {type(owner).__name__} that reduce_ changed, got a "
            f"{type(model).__name__} inside it"
        )
    return reduction, names[id(owner)]


def _read_settings(folder: Path) -> tuple[Any, str]:
    if (folder / SETTINGS).is_file():
        return read_object(folder / SETTINGS), str(folder / SETTINGS)
    config = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if "elip" not in config:
        raise FileNotFoundError(
            f"folder: expected {SETTINGS}, or a {CONFIG} with 'elip', as save_reduced writes them, "
            f"got neither in {folder}; the model is dense: load it by {_dense_call(folder, config)}"
            ", and reduce_ it"
        )
    return config["elip"], f"{folder / CONFIG}: elip"


def _dense_call(folder: Path, config: dict[str, Any]) -> str:
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return f"open_clip.create_model('local-dir:{folder}')"
    if "architecture" in config:
        return f"open_model('timm:local-dir:{folder}')"
    return f"open_model('hf:{folder}')" if "model_type" in config else "its library"


def _open_dense(folder: Path) -> nn.Module:
    config = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    source = source_of_family(config.get("model"))
    if source is not None:  # with its adapter, if it has one
        return source.load_model(folder).eval()
    if (folder / ADAPTER).is_file():
        raise ValueError(
            f"model: expected PeftModel.from_pretrained(base, {str(folder)!r}), since the folder "
            "has only an adapter, got None"
        )
    if (folder / OPEN_CLIP_CONFIG).is_file():
        with quiet_logs():
            return load_open_clip(folder)
    if "architecture" in config:
        return load_timm(folder)
    if "model_type" in config:
        return _open_transformers(folder, config)
    raise FileNotFoundError(
        f"folder: expected {OPEN_CLIP_CONFIG}, or a {CONFIG} of timm, transformers or ours, got "
        f"none in {folder}"
    )


def _open_transformers(folder: Path, described: dict[str, Any]) -> nn.Module:
    import transformers

    kind = class_in(described, folder / CONFIG)
    is_auto = kind is transformers.AutoModel
    check_config(folder / CONFIG, described)
    with library_errors(folder / CONFIG, f"a config of {kind.__name__}"):
        reader = transformers.AutoConfig if is_auto else kind.config_class
        options = {"trust_remote_code": False} if is_auto else {}
        config = reader.from_pretrained(folder, **options)
    vars(config).pop("elip", None)  # load_reduced applies it to the dense model
    return load_transformers(folder, kind, config)


def _write_timm(model: nn.Module, folder: Path, config: Config) -> None:
    from timm.models import save_for_hf

    if not isinstance(getattr(model, "pretrained_cfg", None), dict):
        raise ValueError(
            f"model: expected a model of timm.create_model, which stores its arguments in "
            f"pretrained_cfg, got a {type(model).__name__} without it"
        )
    save_for_hf(_WithoutWeights(model), folder, model_args=config, safe_serialization=True)
    write_tensors(folder / "model.safetensors", model.state_dict())


class _WithoutWeights:
    """A model whose config timm writes; a full disk is no OSError where timm writes weights."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def state_dict(self) -> dict[str, Tensor]:
        """Return no weights; `write_tensors` writes them."""
        return {}


def _write_open_clip(model: nn.Module, folder: Path, config: Config) -> None:
    import open_clip

    known = open_clip.get_model_config(config) if isinstance(config, str) else config
    if not isinstance(known, dict):
        raise ValueError(
            "config: expected a name of open_clip.list_models(), such as 'ViT-B-16', or a "
            f"model_cfg, which open_clip does not store on a model, got {config!r}"
        )
    preprocessing = open_clip.get_model_preprocess_cfg(model)
    content = {"model_cfg": known, "preprocess_cfg": preprocessing}
    write_json(folder / OPEN_CLIP_CONFIG, content)
    with quiet_logs(), torch.device("meta"):
        _check_config(make_open_clip(folder), model, config)
    write_tensors(folder / "open_clip_model.safetensors", model.state_dict())


def _check_config(made: nn.Module, model: nn.Module, config: Config) -> None:
    """Raise ValueError if the model made from a config has other modules or shapes, norms aside."""
    of_made, of_model = (
        {
            (name, type(module).__name__)
            for name, module in whole.named_modules()
            if not isinstance(module, nn.LayerNorm)
        }
        | {(name, tuple(weight.shape)) for name, weight in whole.state_dict().items()}
        for whole in (made, model)
    )
    if other := sorted(of_made ^ of_model, key=str):
        raise ValueError(
            f"config: expected the model's own, got {config!r:.80}, which differs in {other[0]}"
        )


def _write_by_library(model: nn.Module, folder: Path, config: Config) -> None:
    model.save_pretrained(folder)


WRITERS: dict[str, Callable[[nn.Module, Path, Config], None]] = {
    "timm": _write_timm,
    "open_clip": _write_open_clip,
    "transformers": _write_by_library,
    "peft": _write_by_library,
}


def _card(reduction: Reduction, library: str, folder: Path) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    return str(
        ModelCard.from_template(
            ModelCardData(library_name=library, tags=["token-reduction", "elip"]),
            template_str=CARD,
            **card_values(reduction.strategy, reduction.tower.size),
            name=folder.resolve().name,
            about=f"A model of {library} with token reduction in the image tower. {library} alone "
            "can load it as a dense model.",
            usage='import elip_models\n\nmodel = elip_models.load_reduced("owner/name")',
        )
    )
