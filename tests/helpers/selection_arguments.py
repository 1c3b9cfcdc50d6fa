"""Arguments of select_diverse and select_dpp: some that pass, and of each what is refused; wrong
counts for each image of a batch."""

import torch

import elip_kernels

B, N, D = 2, 10, 8
META = {"device": "meta"}
mask = [[True] * N, torch.ones(B, N), torch.ones(B, N - 1).bool(), torch.ones(B, N, **META).bool()]
both = {
    "tokens": [
        *(None, [[1.0]], torch.randn(N, D), torch.ones(B, N, D).long()),
        *(torch.randn(B, N, 0), torch.randn(B, 0, D)),
    ],
    "keep": [None, True, "4", 0, -1, N + 1, 0.0, 1.5, float("nan")],
    "mask": mask,
    "selection_order": [1, None, "yes"],
}
first = [3, torch.ones(B), torch.ones(B + 1).long(), torch.ones(B, 1).long()]
first += [torch.full((B,), N), torch.full((B,), -1), torch.ones(B, **META).long()]
relevance = [1.0, torch.rand(B, N - 1), torch.ones(B, N).long(), torch.rand(B, N, **META)]


def counts(N):
    """What (B,) counts of up to N tokens are not."""
    wrong = [[N, N], torch.tensor(N), torch.tensor([N]), torch.tensor([[N, N]])]
    wrong += [torch.tensor([N, N + 1]), torch.tensor([-1, N]), torch.tensor([1.0, 1.0])]
    return [*wrong, torch.tensor([N, N], dtype=torch.int32), torch.tensor([N, N], **META)]


def good():
    return {"tokens": torch.randn(B, N, D), "keep": 4}


TABLE = {
    elip_kernels.select_diverse: (good, both | {"first": first}),
    elip_kernels.select_dpp: (good, both | {"relevance": relevance}),
}
