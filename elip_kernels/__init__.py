"""Fused kernels for vision token reduction. All functions take and return tensors."""

from elip_kernels._operator import FallbackWarning, export_custom_ops, use_pytorch_ops
from elip_kernels.info import BipartiteInfo, ReductionInfo, unmerge
from elip_kernels.ops.attention_column_mean import attention_column_mean
from elip_kernels.ops.bipartite import apply_merge, bipartite_merge
from elip_kernels.ops.cls_attention import cls_attention, cls_attention_from_tokens
from elip_kernels.ops.cls_attention_output import cls_attention_output
from elip_kernels.ops.fuse_text import fuse_text
from elip_kernels.ops.merge_nearest import merge_nearest
from elip_kernels.ops.reduce import reduce
from elip_kernels.ops.score_reduce import score_reduce
from elip_kernels.ops.select_diverse import select_diverse
from elip_kernels.ops.select_dpp import select_dpp
from elip_kernels.ops.select_tokens import select_tokens

__version__ = "0.2.0"

__all__ = [
    "BipartiteInfo",
    "FallbackWarning",
    "ReductionInfo",
    "__version__",
    "apply_merge",
    "attention_column_mean",
    "bipartite_merge",
    "cls_attention",
    "cls_attention_from_tokens",
    "cls_attention_output",
    "export_custom_ops",
    "fuse_text",
    "merge_nearest",
    "reduce",
    "score_reduce",
    "select_diverse",
    "select_dpp",
    "select_tokens",
    "unmerge",
    "use_pytorch_ops",
]


def __dir__() -> list[str]:
    """Return the public names, without the package's submodules."""
    return __all__
