"""Calls of select_diverse and select_dpp, and their work by the analytic model."""

import torch

import elip_kernels
from benchmarks.kernel_analysis import least_work


def options_of(B, N, masked):
    return {"mask": torch.rand(B, N) < 0.7} if masked else {}


def run_diverse(B, N, D, K, dtype, masked=False, starts=False):
    options = options_of(B, N, masked) | ({"first": torch.zeros(B).long()} if starts else {})
    elip_kernels.select_diverse(torch.randn(B, N, D).to(dtype), K, **options)


def diverse_works(B, N, D, K, dtype, tiled=False, masked=False, starts=False):
    works = [
        least_work.cosines(B, N, D, dtype, has_nearest=not starts, tiled=tiled),
        least_work.diverse(B, N, D, K, dtype),
    ]
    for work in works if masked else []:
        work.read["real"] = B * N
    if starts:
        del works[1].read["nearest"]
        works[1].read["first"] = B * 8
    return works


def run_dpp(B, N, D, K, dtype, masked=False, weighed=True):
    options = options_of(B, N, masked) | ({"relevance": torch.rand(B, N)} if weighed else {})
    elip_kernels.select_dpp(torch.randn(B, N, D).to(dtype), K, **options)


def dpp_works(B, N, D, K, dtype, tiled=False, masked=False, weighed=True):
    works = [
        least_work.cosines(B, N, D, dtype, tiled=tiled),
        least_work.dpp(B, N, K, has_relevance=weighed),
    ]
    if masked:
        works[1].read["real"] = B * N
    return works
