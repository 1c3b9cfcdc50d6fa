"""What a user writes, for a type checker: `mypy --strict` finds every type that stands here."""

from typing import assert_type

import torch
from torch import Tensor, nn

import elip_kernels
import elip_models
from elip_models.pretraining.models.base import PretrainedModel
from elip_models.strategies.strategy import StageInfo
from elip_models.strategies.summary import Summary
from elip_models.vlm.call import PromptInfo
from elip_models.vlm.summary import MultimodalSummary


class Net(nn.Module):
    """A user's own class, which `reduce_` gives back as it came."""


def use_ops(tokens: Tensor, attn: Tensor, flag: bool) -> None:
    assert_type(elip_kernels.reduce(tokens, attn, 0.5), Tensor)
    out, info = elip_kernels.reduce(tokens, attn, 8, return_info=True)
    assert_type(info, elip_kernels.ReductionInfo)
    either = elip_kernels.reduce(tokens, attn, 8, merge=False, return_info=flag)
    assert_type(either, Tensor | tuple[Tensor, elip_kernels.ReductionInfo])
    assert_type(elip_kernels.unmerge(out, info), Tensor)
    merged, size, match = elip_kernels.bipartite_merge(tokens, tokens, 4, return_info=True)
    assert_type(match, elip_kernels.BipartiteInfo)
    kept = elip_kernels.select_tokens(size, 3)
    assert_type(elip_kernels.select_diverse(tokens, 0.25, mask=attn > 0), Tensor)
    assert_type(elip_kernels.select_dpp(tokens, 8, relevance=attn, selection_order=True), Tensor)
    merged, size, info = elip_kernels.merge_nearest(merged, kept, merged, return_info=True)
    assert_type(info, elip_kernels.ReductionInfo)
    assert_type(elip_kernels.bipartite_merge(merged, merged, 2, size=size), tuple[Tensor, Tensor])
    assert_type(elip_kernels.apply_merge(tokens, match), tuple[Tensor, Tensor])
    assert_type(elip_kernels.cls_attention(tokens, tokens[:, :, None]), Tensor)
    heads = tokens[:, None]
    assert_type(elip_kernels.attention_column_mean(heads, heads, query_mask=None), Tensor)


def use_models(net: Net, images: Tensor, text_cls: Tensor) -> str:
    assert_type(elip_models.reduce_(net, strategy="elip", keep=0.7, scorer="last"), Net)
    elip_models.reduce_(net, strategy=elip_models.ToMe(r=8))
    elip_models.reduce_(net, strategy="tome", r=8)
    elip_models.reduce_(net, "guided_tome", r=8, weight=0.5, decrease=0.5)
    elip_models.reduce_(net, "diverse", keep=64, relevance=True)
    elip_models.reduce_(net, "visionzip", contextual=0.2)
    elip_models.reduce_(net, "dedup", tolerance=0.1)
    elip_models.reduce_(net, "fastv", layer=2)
    elip_models.reduce_(net, "pyramid", stages=4)
    with elip_models.guidance(net, text_cls), elip_models.record_stages(net) as infos:
        net(images)
    assert_type(infos, list[StageInfo] | list[PromptInfo])
    assert_type(elip_models.reduction_summary(net), Summary | MultimodalSummary)
    assert_type(elip_models.is_reduced(net), bool)
    assert_type(elip_models.unreduce_(net), Net)
    assert_type(elip_models.encode_image(net, images, text_cls, schedule="clip"), Tensor)
    tokens, steps = elip_models.encode_image(net, images, strategy="tome", return_info=True)
    assert_type((tokens, steps), tuple[Tensor, list[StageInfo]])
    assert_type(elip_models.EViT().at_flops(net, 0.7), elip_models.EViT)
    assert_type(elip_models.create_model("elip_clip_vit_b16", scorer="last"), PretrainedModel)
    return elip_models.__version__ + elip_kernels.__version__


if __name__ == "__main__":
    use_ops(torch.randn(2, 17, 8), torch.rand(2, 17), flag=True)
