"""Fused kernels for vision token reduction: tensors in, tensors out."""

from elip_kernels._operator import PyTorchFormWarning, decomposed
from elip_kernels.attention_received import attention_received
from elip_kernels.bipartite import bipartite_merge, merge_by
from elip_kernels.cls_attend import cls_attend_from_tokens
from elip_kernels.cls_attention import cls_attention, cls_attention_from_tokens
from elip_kernels.info import BipartiteInfo, ReductionInfo, unmerge
from elip_kernels.nearest import merge_nearest
from elip_kernels.reduce import reduce
from elip_kernels.score_reduce import score_reduce
from elip_kernels.select_tokens import select_tokens

__version__ = "0.1.0"

__all__ = [
    "BipartiteInfo",
    "PyTorchFormWarning",
    "ReductionInfo",
    "__version__",
    "attention_received",
    "bipartite_merge",
    "cls_attend_from_tokens",
    "cls_attention",
    "cls_attention_from_tokens",
    "decomposed",
    "merge_by",
    "merge_nearest",
    "reduce",
    "score_reduce",
    "select_tokens",
    "unmerge",
]


def __dir__() -> list[str]:
    """The public names; files of the package would stand among them."""
    return __all__
