"""Reduced models on disk: the library's own files, and how the model is reduced.

    timm           config.json, model.safetensors                       elip.json
    open_clip      open_clip_config.json, open_clip_model.safetensors   elip.json
    transformers   what its save_pretrained writes; "elip" in config.json
    peft           what its save_pretrained writes, the adapter alone   elip.json
    ours           what save_pretrained writes; fields of config.json

So each library loads its folder without us, dense.
"""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from elip_models.models.base import PretrainedModel
from elip_models.models.io.files import read_object, write_file
from elip_models.models.io.hub import CARD, card_values, fetch_folder, staging_folder
from elip_models.models.registry import MODELS, load_model
from elip_models.reduction.hf_config import store_in_config
from elip_models.reduction.patch import reduce_, reductions_of
from elip_models.reduction.serialization import settings_of, strategy_of
from elip_models.reduction.state import Reduction
from elip_models.reduction.strategies.dense import Dense
from elip_models.reduction.strategy import Strategy
from elip_models.towers import library_of, without_adapter
from elip_models.validation import as_config_error, check

SETTINGS = "elip.json"
CONFIG = "config.json"
OPEN_CLIP_CONFIG = "open_clip_config.json"
ADAPTER = "adapter_config.json"
Config = str | dict[str, Any] | None


def save_reduced(model: nn.Module, folder: str | os.PathLike, *, config: Config = None) -> Path:
    """Save a reduced model as its library does, and with it how it is reduced; returns the folder.

    The folder also loads with the library alone, and is dense then. A model card, README.md, is
    written where there is none. Wrappers of torch.compile and DistributedDataParallel are looked
    through. Of a model of peft the adapter alone is saved, as peft does, and the reduction.

    Args:
        model: what `reduce_` has changed, or one with such a model inside; or one of ours whose
            config reduces it.
        folder: is made where it is not there; files of the same names are replaced.
        config: the name of an open_clip model, such as "ViT-B-16", which open_clip does not store,
            or its `model_cfg`; arguments of timm's model beside those that it notes.

    Raises:
        TypeError, ValueError: a model that is not reduced, is sharded, or cannot be saved by its
            library; a `config` that is missing, or of another model.
    """
    check("model", model, nn.Module)
    check("folder", folder, str | os.PathLike)
    model, folder = _unwrapped(model), Path(folder)
    if isinstance(model, PretrainedModel):
        _check_reduces(model)
        return model.save_pretrained(folder)
    reduction, place = _reduction_in(model)
    is_adapter = without_adapter(model) is not model
    library = "peft" if is_adapter else library_of(model)
    if library not in WRITERS:
        raise TypeError(
            f"model: expected one of {', '.join(WRITERS)}, got {type(model).__name__}; save the "
            "reduced model inside it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    store_in_config(model, reduction)
    WRITERS[library](model, folder, config)
    if library == "transformers" and not place:
        (folder / SETTINGS).unlink(missing_ok=True)
    else:
        _write_json(folder / SETTINGS, {"module": place, **settings_of(reduction.strategy)})
    if not (folder / "README.md").exists():
        write_file(folder / "README.md", _card(reduction, library, folder).encode())
    return folder


def load_reduced(
    folder: str | os.PathLike,
    model: nn.Module | None = None,
    *,
    strategy: str | Strategy | None = None,
) -> nn.Module:
    """Load what `save_reduced` wrote, reduced as it was; in eval mode where it is opened here.

    Args:
        folder: or 'owner/name' of a repository of the hub.
        model: one that its library has loaded from the folder, to be reduced in place: for options
            of the library, a class of your own, or an adapter of peft on its model.
        strategy: as of `reduce_`, instead of the saved one; one of your own has to be passed.

    Raises:
        FileNotFoundError: no such folder, or none of a reduced model.
        ConfigError: settings that cannot be read, or do not fit the model, with file and key.
        TypeError, ValueError: a folder of no library that is known, or of a damaged file.
    """
    check("model", model, nn.Module | None)
    folder = fetch_folder(folder)
    try:
        model = _opened(folder) if model is None else model
    except SafetensorError as error:
        raise ValueError(f"folder: expected whole weights in {folder}, got {error}") from error
    if isinstance(model, PretrainedModel):
        _check_reduces(model)
        if strategy is not None:
            raise ValueError(
                f"strategy: expected None for a {type(model).__name__}, which its config reduces, "
                f"got {strategy!r}; change fields of the config, create_model('hf:..', schedule=..)"
            )
        return model
    saved, where = _settings_in(folder)
    with as_config_error(where):
        place = saved.pop("module", "") if isinstance(saved, dict) else ""
        reduced = _inside(model, place)
        if strategy is None:
            reduce_(reduced, strategy=strategy_of(saved))
            return model
    reduce_(reduced, strategy=strategy)
    return model


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers that leave its modules as they are."""
    if isinstance(model, torch._dynamo.OptimizedModule):
        return _unwrapped(model._orig_mod)
    if isinstance(model, DistributedDataParallel):
        return _unwrapped(model.module)
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise TypeError(
            "model: expected one whose parameters are whole, got a sharded one; load "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) into an "
            "unsharded one, and save that"
        )
    return model


def _check_reduces(model: PretrainedModel) -> None:
    if isinstance(model.config.reduction, Dense):
        raise ValueError(
            f"model: expected one whose config reduces it, got a dense {type(model).__name__}; "
            "save_pretrained and from_pretrained are for those"
        )


def _reduction_in(model: nn.Module) -> tuple[Reduction, str]:
    """How the model is reduced, and the name of the module in it that `reduce_` was given."""
    found = reductions_of(model)
    if len(found) != 1:
        raise ValueError(
            f"model: expected one that reduce_ has changed, got {len(found) or 'no'} reductions in "
            f"it; {'save each model alone' if found else 'its library saves a dense one'}"
        )
    owner = found[0].model
    names = {id(module): name for name, module in without_adapter(model).named_modules()}
    if id(owner) not in names:
        raise ValueError(
            f"model: expected the whole {type(owner).__name__} that reduce_ was given, got a "
            f"{type(model).__name__} inside it"
        )
    return found[0], names[id(owner)]


def _inside(model: nn.Module, place: Any) -> nn.Module:
    """The module that `reduce_` was given, by its name in the model."""
    try:
        return without_adapter(model).get_submodule(place) if place else model
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"module: expected the name of a module in {type(model).__name__}, got {place!r}"
        ) from error


def _settings_in(folder: Path) -> tuple[Any, str]:
    """The settings that a folder holds, and where they stand."""
    if (folder / SETTINGS).is_file():
        return read_object(folder / SETTINGS), str(folder / SETTINGS)
    config = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if "elip" not in config:
        raise FileNotFoundError(
            f"folder: expected {SETTINGS}, or a {CONFIG} with 'elip', as save_reduced writes them, "
            f"got neither in {folder}; the model is dense: open it by its library, and reduce_ it"
        )
    return config["elip"], f"{folder / CONFIG}: elip"


def _opened(folder: Path) -> nn.Module:
    """The model of a folder, dense, by the library that wrote it, in eval mode."""
    if (folder / ADAPTER).is_file():
        raise ValueError(
            f"model: expected the model with its adapter, PeftModel.from_pretrained(base, "
            f"{str(folder)!r}), since the folder holds an adapter alone, got None"
        )
    if (folder / OPEN_CLIP_CONFIG).is_file():
        import open_clip

        return open_clip.create_model(f"local-dir:{folder}").eval()
    config = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if config.get("model") in MODELS:
        return load_model(folder).eval()
    if "architecture" in config:
        import timm

        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    if "model_type" in config:
        import transformers

        architecture = (config.get("architectures") or ["AutoModel"])[0]
        kind = getattr(transformers, architecture, None)
        if kind is None:
            raise ValueError(
                f"model: expected one loaded by its own class, {architecture}, which transformers "
                "has not, got None"
            )
        return kind.from_pretrained(folder).eval()
    raise FileNotFoundError(
        f"folder: expected {OPEN_CLIP_CONFIG}, or a {CONFIG} of timm, transformers or ours, got "
        f"none in {folder}"
    )


def _write_timm(model: nn.Module, folder: Path, config: Config) -> None:
    from timm.models._hub import save_config_for_hf

    if not isinstance(getattr(model, "pretrained_cfg", None), dict):
        raise ValueError(
            f"model: expected one of timm.create_model, which notes how to make it again, got a "
            f"{type(model).__name__} without"
        )
    with staging_folder(folder) as stage:
        save_config_for_hf(model, stage / CONFIG, model_args=config)
        _write_weights(model, stage / "model.safetensors")


def _write_open_clip(model: nn.Module, folder: Path, config: Config) -> None:
    import open_clip

    known = open_clip.get_model_config(config) if isinstance(config, str) else config
    if not isinstance(known, dict):
        raise ValueError(
            "config: expected a name of open_clip.list_models(), such as 'ViT-B-16', or a "
            f"model_cfg, which open_clip does not store on a model, got {config!r}"
        )
    described = {
        "model_cfg": known,
        "preprocess_cfg": open_clip.get_model_preprocess_cfg(model),
    }
    with staging_folder(folder) as stage:
        _write_json(stage / OPEN_CLIP_CONFIG, described)
        _check_same(_made_by_open_clip(stage), model, config)
        _write_weights(model, stage / "open_clip_model.safetensors")


def _made_by_open_clip(folder: Path) -> nn.Module:
    """The model of a folder without its weights, and without the warning that there are none."""
    import open_clip

    def drop(record: logging.LogRecord) -> bool:
        return False

    logging.root.addFilter(drop)
    try:
        with torch.device("meta"):
            return open_clip.create_model(
                f"local-dir:{folder}",
                load_weights=False,
                device="meta",
                pretrained_image=False,
                pretrained_text=False,
            )
    finally:
        logging.root.removeFilter(drop)


def _check_same(made: nn.Module, model: nn.Module, config: Config) -> None:
    """Raises ValueError where a config makes other modules or shapes; norms, whose class follows
    the precision, aside.
    """

    def parts(whole: nn.Module) -> set[tuple[str, Any]]:
        modules = (m for m in whole.named_modules() if not isinstance(m[1], nn.LayerNorm))
        shapes = {(name, tuple(weight.shape)) for name, weight in whole.state_dict().items()}
        return shapes | {(name, type(module).__name__) for name, module in modules}

    other = sorted(parts(made) ^ parts(model), key=str)
    if other:
        raise ValueError(
            f"config: expected that of the model, got {config!r:.80}, which differs in {other[0]}"
        )


def _write_hf(model: nn.Module, folder: Path, config: Config) -> None:
    model.save_pretrained(folder)


WRITERS: dict[str, Callable[[nn.Module, Path, Config], None]] = {
    "timm": _write_timm,
    "open_clip": _write_open_clip,
    "transformers": _write_hf,
    "peft": _write_hf,
}


def _write_weights(model: nn.Module, path: Path) -> None:
    """The tensors as they are, but for their memory format, which safetensors does not know."""
    from safetensors.torch import save_file

    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, path, metadata={"format": "pt"})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())


def _card(reduction: Reduction, library: str, folder: Path) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    tags = ["token-reduction", "elip"]
    values = card_values(reduction.strategy, reduction.tower.size)
    values["name"] = folder.resolve().name
    values["about"] = (
        f"A model of {library} whose image tower drops and merges tokens. It loads with {library} "
        "alone too, and is dense then."
    )
    values["usage"] = (
        'import elip_models\n\nmodel = elip_models.load_reduced("owner/name")  # or the folder'
    )
    data = ModelCardData(library_name=library, tags=tags)
    return str(ModelCard.from_template(data, template_str=CARD, **values))
