"""The command `elip export`: a reduced model as an ONNX file, compared to PyTorch."""

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from elip_models.validation import (
    PACKAGES,
    ConfigError,
    as_config_error,
    check_output,
    require_extra,
    require_packages,
    shortened,
)

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console
    from rich.markup import escape

if TYPE_CHECKING:
    from onnxruntime import NodeArg
    from torch import Tensor, nn

DYNAMIC = "dynamic"
LARGEST = 2**31 - 2**20  # bytes of a protobuf message, less its graph


def export(
    model: Annotated[
        str, typer.Argument(help="timm:NAME, open_clip:NAME:TAG, hf:NAME or folder of a model.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="ONNX file to write.")],
    strategy: Annotated[
        str | None,
        typer.Option(help="Strategy, such as tome:r=8; default: that of reduce_, mostly merge."),
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Mean share of tokens over the layers.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Image side in pixels.")] = None,
    batch: Annotated[
        str, typer.Option(help="Number of images in a call; dynamic allows any number.")
    ] = DYNAMIC,
    pretrained: Annotated[bool, typer.Option(help="Load the model's weights.")] = True,
) -> None:
    """Write a reduced model as an ONNX file, and compare onnxruntime to PyTorch."""
    if output.suffix != ".onnx":
        raise ConfigError(f"OUT.onnx: expected a name ending in .onnx, got {output}")
    check_output("OUT.onnx", output)
    if batch != DYNAMIC and not (batch.isdecimal() and len(batch) < 6 and int(batch) > 0):
        raise ConfigError(
            f"--batch: expected a number from 1 to 99999, or {DYNAMIC}, got {shortened(batch)}"
        )
    require_packages("elip export", *PACKAGES["onnx"])
    count = None if batch == DYNAMIC else int(batch)
    from elip_models.api import reduction_summary
    from elip_models.saving.files import write_file
    from elip_models.saving.meta_build import quiet_logs

    console = Console(stderr=True)
    with console.status("opening the model"):
        reduced = _open_reduced(model, strategy, keep, image_size, pretrained=pretrained)
    with console.status("exporting: one to two minutes for a ViT-B"), quiet_logs():
        content = _exported(reduced, count)
    write_file(output, content)
    with console.status("running onnxruntime"):
        found = _compare(reduced, output, count or 3)
    weights = sum(parameter.numel() for parameter in reduced.parameters()) / 1e6
    lines = (
        str(reduction_summary(reduced)),
        f"parameters        {weights:.1f} M",
        f"file              {output}, {len(content) / 1e6:.1f} MB",
        f"inputs            {found.inputs}",
        f"outputs           {found.outputs}",
        f"difference        {found.difference:.1e} at most between onnxruntime and PyTorch, "
        f"where outputs go up to {found.largest:.2g}",
    )
    Console().print(escape("\n".join(lines)), soft_wrap=True, highlight=False)


def _open_reduced(
    spec: str,
    strategy: str | None,
    keep: float | None,
    image_size: int | None,
    *,
    pretrained: bool,
) -> "nn.Module":
    """Return the reduced model that `spec` names, in eval mode."""
    from elip_models.api import reduce_
    from elip_models.saving.open_model import open_model, size_options
    from elip_models.towers import SelfReducingModel, as_reducible
    from elip_models.vlm.families import refuse_multimodal

    with as_config_error("MODEL", inner="spec"):
        model = open_model(spec, pretrained=pretrained, **size_options(spec, image_size))
    with as_config_error("MODEL", inner="model"):
        refuse_multimodal(model)
        reducible = as_reducible(model)
        if isinstance(reducible, SelfReducingModel) or not (
            reducible.has_text or reducible.image_model is model
        ):
            raise TypeError(
                "expected an image model, CLIP, SigLIP or BLIP of timm, open_clip or "
                f"transformers, got {type(model).__name__}; export its image tower by "
                "torch.onnx.export(.., dynamo=True)"
            )
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if size > LARGEST:
        raise ConfigError(
            f"MODEL: expected less than 2 GB of weights, got {size / 1e9:.1f} GB; call "
            "torch.onnx.export(.., dynamo=True, external_data=True), which writes a second file"
        )
    with as_config_error("export"):
        return reduce_(model, strategy=strategy, keep=keep)


def _inputs(model: "nn.Module", count: int) -> "dict[str, Tensor]":
    """Return `count` random images, with texts if the model reads them, by the forward's names."""
    import torch

    from elip_models.towers import as_reducible, as_tower

    reducible = as_reducible(model)
    images = torch.randn(count, 3, *as_tower(reducible.image_model).image_size)
    if reducible.has_text:
        return reducible.random_inputs(images)
    return {next(iter(inspect.signature(model.forward).parameters)): images}


def _exported(model: "nn.Module", count: int | None) -> bytes:
    """Return the ONNX file of a model for `count` images, or any number if it is None."""
    import torch

    inputs = _inputs(model, count or 2)  # a single image would fix the number
    batch = {0: torch.export.Dim("batch")}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the exporter on its own code
        program = torch.onnx.export(
            model,
            kwargs=inputs,
            dynamo=True,
            dynamic_shapes=None if count else dict.fromkeys(inputs, batch),
            verbose=False,
        )
    return program.model_proto.SerializeToString()


class _Compared(NamedTuple):
    """Inputs and outputs of a file, its largest difference from PyTorch, the largest output."""

    inputs: str
    outputs: str
    difference: float
    largest: float


def _compare(model: "nn.Module", path: Path, count: int) -> _Compared:
    """Return what the file returns for `count` images, beside PyTorch."""
    import onnxruntime
    import torch

    inputs = _inputs(model, count)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.no_grad():
        expected = list(_tensors_in(model(**inputs)))
    differences = [
        (torch.from_numpy(output) - tensor).abs().max()
        for output, tensor in zip(outputs, expected, strict=True)
    ]
    return _Compared(
        *(_described(each) for each in (session.get_inputs(), session.get_outputs())),
        float(max(differences)),
        float(max(tensor.abs().max() for tensor in expected)),
    )


def _described(tensors: "Sequence[NodeArg]") -> str:
    """Return names and shapes of inputs or outputs, such as 'x (batch, 3, 224, 224)'."""
    return ", ".join(f"{each.name} ({', '.join(map(str, each.shape))})" for each in tensors)


def _tensors_in(output: Any) -> "Iterator[Tensor]":
    """Yield the tensors in the output of a model, in its order."""
    from torch import Tensor

    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | tuple | list):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors_in(value)
