"""The options of `embed`, with their defaults."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

from elip_models.embedding.encoder import Precision
from elip_models.embedding.image_source import OnDuplicate, SourceOptions
from elip_models.validation import ConfigError, Count, PositiveInt, Share, Workers, check_fields

EmbeddingDtype = Literal["float32", "float16"]


@dataclass(frozen=True)
class EmbedOptions:
    """How `embed` reads the images, runs the model, and writes the vectors.

    Args:
        preprocess: 'imagenet', 'clip' or a JSON file. None: the model's own.
        image_column: column of the images, or of their paths. None: by its type or name.
        key_column: column of the keys. None: `key`, if there is one.
        keep_columns: columns of the source that are copied into the output.
        on_duplicate: 'error', or 'suffix' to append #2, #3 and so on to equal keys.
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
    keep_columns: tuple[str, ...] = ()
    on_duplicate: OnDuplicate = "error"
    check: Count = 200
    min_cosine: Share | None = None
    batch_size: PositiveInt = 64
    shard_size: PositiveInt = 10_000
    workers: Workers | None = None
    embedding_dtype: EmbeddingDtype = "float32"
    precision: Precision = "auto"
    device: str | None = None
    compile: bool = False
    pretrained: bool = True
    ray: str | None = None
    ray_actors: PositiveInt | None = None

    def __post_init__(self) -> None:
        if isinstance(self.keep_columns, list):
            object.__setattr__(self, "keep_columns", tuple(self.keep_columns))
        try:
            check_fields(self)
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error)) from error

    @property
    def source(self) -> SourceOptions:
        """The options of the source."""
        return SourceOptions(
            self.image_column, self.key_column, self.keep_columns, self.on_duplicate
        )


class EmbedKeywords(TypedDict, total=False):
    """The fields of `EmbedOptions` as keyword arguments."""

    preprocess: str | Path | None
    image_column: str | None
    key_column: str | None
    keep_columns: tuple[str, ...] | list[str]
    on_duplicate: OnDuplicate
    check: int
    min_cosine: float | None
    batch_size: int
    shard_size: int
    workers: int | None
    embedding_dtype: EmbeddingDtype
    precision: Precision
    device: str | None
    compile: bool
    pretrained: bool
    ray: str | None
    ray_actors: int | None
