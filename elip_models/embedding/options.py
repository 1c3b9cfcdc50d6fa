"""The options of `embed`, with their defaults."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from elip_models.embedding.encoder import Precision
from elip_models.validation import ConfigError

EmbeddingDtype = Literal["float32", "float16"]
OF_MODEL = ("preprocess", "precision", "device", "compile", "pretrained")
"""Options with which `embed` opens a model."""
OF_SOURCE = ("image_column", "key_column", "keep_columns")
"""Options with which `embed` opens a source."""


@dataclass(frozen=True)
class EmbedOptions:
    """How `embed` reads the images, runs the model, and writes the vectors.

    Args:
        preprocess: 'imagenet', 'clip' or a JSON file. None: the model's own.
        image_column: column of the images, or of their paths. None: by its type or name.
        key_column: column of the keys. None: `key`, if there is one.
        keep_columns: columns of the source that are copied into the output.
        check: number of images that are first encoded dense and reduced; 0: no check.
        min_cosine: smallest mean cosine in the check with which the run begins.
        batch_size: images in a batch.
        shard_size: images in a file.
        workers: processes that decode images; 0 decodes in this process. None: by the machine.
        embedding_dtype: type of the numbers in the files.
        precision: 'fp32', 'bf16' or 'fp16' in the model; 'auto' is bf16 on a GPU that has it.
        device: where the model runs, such as 'cuda:1'. None: the GPU if there is one.
        compile: run the model by torch.compile.
        pretrained: load the model's weights.
        ray: the Ray cluster that embeds: 'local' for a new one on this machine, 'auto' for that of
            this node, or 'HOST:PORT'. None: this process embeds.
        ray_actors: actors of Ray, each with the model. None: one for each GPU of the cluster, or
            as many as nodes if there are no GPUs.
    """

    preprocess: str | Path | None = None
    image_column: str | None = None
    key_column: str | None = None
    keep_columns: Sequence[str] = ()
    check: int = 200
    min_cosine: float | None = None
    batch_size: int = 64
    shard_size: int = 10_000
    workers: int | None = None
    embedding_dtype: EmbeddingDtype = "float32"
    precision: Precision = "auto"
    device: str | None = None
    compile: bool = False
    pretrained: bool = True
    ray: str | None = None
    ray_actors: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "shard_size"):
            if (size := getattr(self, name)) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {size}")
        if self.ray is None and self.ray_actors is not None:
            raise ConfigError(
                f"ray_actors: expected none without ray, got {self.ray_actors}; pass ray='local'"
            )
        if self.min_cosine is not None and not self.check:
            raise ConfigError(
                f"min_cosine: expected none with check=0, which skips the check, got "
                f"{self.min_cosine}; leave out one of them"
            )
        if self.embedding_dtype not in ("float32", "float16"):
            raise ConfigError(
                f"embedding_dtype: expected float32 or float16, got {self.embedding_dtype!r}"
            )

    def refuse(self, names: Sequence[str], owner: str, function: str) -> None:
        """Raise ConfigError for an option that a model or source was opened with.

        Args:
            names: `OF_MODEL` or `OF_SOURCE`. With Ray, `device` is that of the actors.
            owner: what has these options, such as 'an Encoder'.
            function: which opens it.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            is_of_ray = field.name == "device" and self.ray is not None
            if field.name in names and not is_of_ray and value not in (field.default, []):
                raise ConfigError(
                    f"{field.name}: expected the default with {owner}, which has its own, got "
                    f"{value!r}; pass it to {function}"
                )
