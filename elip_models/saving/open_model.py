"""Models by a text: of timm, open_clip and transformers, of this library, or a saved folder.

    timm:vit_base_patch16_224[:FILE]          an image model of timm, with the weights in a file
    open_clip:ViT-B-16[:laion2b_s34b_b88k]    a CLIP of open_clip, with its weights, also [:FILE]
    timm:local-dir:FOLDER, open_clip:local-dir:FOLDER     what the library itself saved
    hf:google/vit-base-patch16-224            of transformers or this library, by name or folder
    elip_clip_vit_b16                         a name of `list_models`
    vit_tome                                  a folder of `save_reduced`, with its reduction
    runs/clip_tiny                            a folder of a run, or of `save_pretrained`

A library is imported when one of its models is opened.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from elip_models.saving.dense_models import (
    CONFIG,
    OPEN_CLIP_CONFIG,
    class_in,
    from_config,
    load_transformers,
)
from elip_models.saving.files import read_config, read_object
from elip_models.saving.hub import fetch_folder
from elip_models.saving.meta_build import check_config, library_errors
from elip_models.saving.model_registry import registered_names, source_of_family, source_of_name
from elip_models.saving.saved_folder import recover
from elip_models.saving.saved_reduced import is_saved_reduction, load_reduced
from elip_models.validation import check, did_you_mean, mismatch_error, require_extra

FORMS = (
    "'timm:NAME', 'timm:NAME:FILE', 'open_clip:NAME', 'open_clip:NAME:TAG', "
    "'open_clip:NAME:FILE', 'hf:NAME' or 'hf:FOLDER' ('hf:owner/name' also without 'hf:'), "
    "'timm:local-dir:FOLDER', 'open_clip:local-dir:FOLDER', a name of list_models(), or a folder "
    "of save_reduced, of save_pretrained or of a run"
)
ELSEWHERE = ("local-dir:", "hf-hub:")
"""What a name of timm or open_clip begins with that is not in its list."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
LISTED = ("timm", "open_clip")
"""The libraries that list the names of their models."""
IMAGE_SIZE = {"timm": "img_size", "open_clip": "force_image_size"}
"""Library -> its option for the image size; of other models it is a field of the config."""


def open_model(
    spec: str, *, pretrained: bool = True, with_head: bool = False, **options: Any
) -> nn.Module:
    """Open the model that `spec` names, in eval mode.

    With `pretrained=False` under `with torch.device("meta"):`, the model takes no memory. Code in a
    folder or a repository does not run. A whole part of a transformers model that its weights
    lack, such as a pooler, has initial values, with a warning.

    Example::

        model = open_model("timm:vit_base_patch16_224")

    Args:
        spec: 'timm:NAME', or 'timm:NAME:FILE' with the weights in a file; 'open_clip:NAME' for the
            first weights that open_clip lists, or 'open_clip:NAME:TAG', or a file instead of the
            tag (a slash may stand for the second colon); NAME of both libraries can be
            'local-dir:FOLDER'; 'hf:NAME' or 'hf:FOLDER', where
            'hf:owner/name' needs no 'hf:'; a name of `list_models`; or a folder: of
            `save_reduced`, whose model is reduced, of `save_pretrained`, or of a run, which has
            such a folder as `model`. A folder without weights needs `pretrained=False`.
        pretrained: load weights; False for random weights. Names of `list_models` have no weights.
        with_head: open a model of transformers by the class that its config names, with its
            classifier or language model. False: without, as AutoModel does.
        options: of timm.create_model or open_clip.create_model, or fields of the config.

    Raises:
        ValueError: the spec has another form, its library does not have the name, the weights
            cannot be found, or tensors in a folder of transformers are missing, not finite, of
            another shape or no floats.
        ImportError: a library is missing; the message names the extra.
    """
    if not isinstance(spec, str):
        raise TypeError(f"spec: expected a text, {FORMS}, got {type(spec).__name__}")
    check("pretrained", pretrained, bool)
    check("with_head", with_head, bool)
    recover(spec.removeprefix("hf:"))
    library, name = split_spec(spec)
    if library is not None:
        with require_extra("open_model"), missing_files_as_value_error("spec", spec):
            if library == "hf":
                return _open_hf(name, pretrained, options, with_head).eval()
            return OPENERS[library](name, pretrained, options).eval()
    if (source := source_of_name(spec)) is not None:
        return source.create_model(spec, pretrained, **options).eval()
    if os.path.isdir(spec):
        return _from_folder(model_folder(spec), pretrained, options, with_head).eval()
    raise ValueError(f"spec: expected {FORMS}, got {spec!r}{_with_library(spec)}")


def _with_library(name: str) -> str:
    """Return the end of an error about a name without library: the spec that it may mean, or ""."""
    names = {library: _names(library) for library in LISTED if find_spec(library) is not None}
    base = name.partition(".")[0] or name
    for library, known in names.items():
        if base in known:
            return f"; did you mean {f'{library}:{name}'!r}?"
    specs = (f"{library}:{known}" for library in names for known in names[library])
    return did_you_mean(name, [*registered_names(), *specs])


def _names(library: str) -> list[str]:
    """Return the names of a library's models."""
    return import_module(library).list_models()


def model_folder(spec: str) -> Path:
    """Return the folder of a saved model: `spec` itself, or `model` in the folder of a run."""
    folder = Path(spec)
    inner = folder / "model"
    return inner if not (folder / CONFIG).is_file() and (inner / CONFIG).is_file() else folder


def split_spec(spec: str) -> tuple[str | None, str]:
    """Split 'timm:NAME' into ('timm', 'NAME'); a spec without library gives (None, spec).

    'owner/name' is ('hf', 'owner/name'), unless there is such a path.
    """
    library, _, name = spec.partition(":")
    if name and library in OPENERS:
        return library, name
    is_on_hub = HUB_NAME.fullmatch(spec) is not None and not os.path.exists(spec)
    return "hf" if is_on_hub else None, spec


def size_options(spec: str, image_size: int | None) -> dict[str, int]:
    """Return the option of `open_model` for images of this side in pixels; none for None."""
    key = IMAGE_SIZE.get(split_spec(spec)[0] or "", "image_size")
    return {} if image_size is None else {key: image_size}


def split_weights(name: str) -> tuple[str, str]:
    """Split 'NAME:WEIGHTS' or 'NAME/WEIGHTS' of a model of timm or open_clip; "" without any."""
    if name.startswith(ELSEWHERE):
        return name, ""
    match = re.match(r"([^:/]+)[:/](.*)", name, re.DOTALL)
    return (match[1], match[2]) if match else (name, "")


def _open_timm(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    import timm

    is_elsewhere, file = name.startswith(ELSEWHERE), ""
    if not is_elsewhere and ":" in name:
        name, file = split_weights(name)
        _check_weights_file(file, pretrained)
        options = {"pretrained_cfg_overlay": {"file": file}, **options}
    if not is_elsewhere and not timm.is_model(name.rpartition("/")[2].partition(".")[0]):
        raise ValueError(
            f"spec: expected a name of timm.list_models(), got {name!r}"
            f"{did_you_mean(name, _names('timm'))}"
        )
    with library_errors(f"spec: {file}", f"weights of {name}") if file else nullcontext():
        return timm.create_model(name, pretrained=pretrained, **options)


def _check_weights_file(file: str, pretrained: bool) -> None:
    if not os.path.isfile(file):  # False also for a name that no file can have
        raise ValueError(f"spec: expected a file of weights behind the name, got {file!r:.300}")
    if not pretrained:
        raise ValueError(f"pretrained: expected True with a file of weights, got False and {file}")


def _open_open_clip(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    import open_clip

    device = torch.get_default_device()
    if name.startswith(ELSEWHERE):
        weights = {"load_weights": pretrained, "require_pretrained": pretrained}
        with library_errors(f"spec: {name}", "a model of open_clip with weights"):
            return open_clip.create_model(name, **weights, device=device, **options)
    name, tag = split_weights(name)
    if name not in open_clip.list_models():
        raise ValueError(
            f"spec: expected a name of open_clip.list_models(), got {name!r}"
            f"{did_you_mean(name, _names('open_clip'))}"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    is_file = tag not in tags and os.path.isfile(tag)
    if is_file:
        _check_weights_file(tag, pretrained)
    elif tag and tag not in tags:
        raise ValueError(f"spec: expected weights of {name} among {tags}, or a file, got {tag!r}")
    if pretrained and not tags and not is_file:
        raise ValueError(
            f"spec: expected a model with weights in open_clip, got {name!r}; pass pretrained=False"
        )
    weights = (tag or tags[0]) if pretrained else None
    with library_errors(f"spec: {tag}", f"weights of {name}") if is_file else nullcontext():
        try:
            return open_clip.create_model(name, pretrained=weights, device=device, **options)
        except RuntimeError as error:  # of a failed download
            if is_file or weights is None:
                raise
            raise OSError(str(error)) from error


def _open_hf(
    name: str, pretrained: bool, options: dict[str, Any], with_head: bool = False
) -> nn.Module:
    from transformers import AutoConfig, AutoModel, BlipForImageTextRetrieval, PretrainedConfig

    if "@" in name and not os.path.exists(name):
        raise ValueError(
            f"spec: expected a name on the hub without a revision, got {name!r:.300}; download it "
            "by `hf download NAME --revision REVISION --local-dir FOLDER`, and pass 'hf:FOLDER'"
        )
    with library_errors(name, "a name on the hub, or a folder with a config of transformers"):
        described, _ = PretrainedConfig.get_config_dict(name)
    if mismatch_error(described, dict):
        raise ValueError(f"{name}: expected a JSON object in config.json, got {described!r:.100}")
    if source_of_family(described.get("model")) is not None:
        return _from_folder(fetch_folder(name), pretrained, options)
    check_config(Path(name) / "config.json", described)
    with library_errors(name, "a config of a model in this version of transformers"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
        ranks = BlipForImageTextRetrieval.__name__ in (
            config.architectures or [BlipForImageTextRetrieval.__name__]
        )
        kind = BlipForImageTextRetrieval if config.model_type == "blip" and ranks else AutoModel
        kind = class_in(described, name) if with_head else kind
        if not pretrained:
            return from_config(kind, config)
    return load_transformers(name, kind, config, new_parts=True)


OPENERS: dict[str, Callable[[str, bool, dict[str, Any]], nn.Module]] = {
    "timm": _open_timm,
    "open_clip": _open_open_clip,
    "hf": _open_hf,
}


def _from_folder(
    folder: Path, pretrained: bool, options: dict[str, Any], with_head: bool = False
) -> nn.Module:
    if is_saved_reduction(folder):
        if options or not pretrained:
            raise ValueError(
                f"spec: expected no options with {folder}, which save_reduced wrote, got "
                f"{options or {'pretrained': False}}; open the dense model {_dense_form(folder)}"
            )
        return load_reduced(folder).eval()
    if (folder / OPEN_CLIP_CONFIG).is_file():
        raise ValueError(
            f"spec: expected 'open_clip:local-dir:{folder}' for a dense model of open_clip, got "
            f"'{folder}'"
        )
    if not (folder / CONFIG).is_file():
        raise ValueError(f"spec: expected {FORMS}, got a folder with no {CONFIG} in it, {folder}")
    if "model_type" in read_object(folder / CONFIG):
        return _open_hf(str(folder), pretrained, options, with_head)
    if "architecture" in read_object(folder / CONFIG):
        raise ValueError(
            f"spec: expected 'timm:local-dir:{folder}' for a dense model of timm, got '{folder}'"
        )
    family, config = read_config(folder, with_weights=pretrained)
    source = source_of_family(family)
    if source is None:
        raise ValueError(f"spec: expected a folder of our models, or 'hf:{folder}', got {folder}")
    if pretrained:
        return source.load_model(folder, **options)
    return source.from_config(family, config | options)


def _dense_form(folder: Path) -> str:
    """Return how to open the dense model of a folder of `save_reduced`, in words."""
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return f"as 'open_clip:local-dir:{folder}'"
    library = "timm:local-dir" if "architecture" in read_object(folder / CONFIG) else "hf"
    return f"as '{library}:{folder}'"


@contextmanager
def missing_files_as_value_error(argument: str, spec: str) -> Iterator[None]:
    """Turn the OSError of a library that finds no files of that name into a ValueError."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{argument}: expected a model with local or downloadable files, got {spec!r}: {error}"
        ) from error
