"""Behaviour that only a device shows: launches, streams, graphs, repeatability, addresses."""

import pytest
import torch

import elip_kernels
from tests.gpu.ops import HALF, OPS, TOKENS, assert_alike, kernels_alone, on, pick

pytestmark = pytest.mark.gpu
every_op = pytest.mark.parametrize("name", OPS)
# Small and large batches may use different kernels.
FULL_KINDS = [(8, torch.bfloat16), (8, torch.float32), (96, torch.bfloat16)]
KINDS = pick(FULL_KINDS, [(1, HALF)])
every_kind = pytest.mark.parametrize(("B", "dtype"), KINDS)
BATCH = pick(8, 1)
LARGE_BATCH, LONG, BEYOND = pick((8192, 577, 2**31), (3, TOKENS, 2**11))


def inputs_of(name, device, B=BATCH, N=TOKENS, dtype=HALF):
    return on(device, OPS[name].inputs(B, N, dtype))


def captured(run, inputs):
    """Capture run(*inputs) after a warm-up; return the graph and the outputs of its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(*inputs)
    return graph, outputs


@pytest.mark.parametrize("N", pick([50, 257, 1025, 4097], [TOKENS]))
def test_a_selection_scans_across_the_warps_of_a_program(device, N):
    scores = torch.stack([torch.randperm(N) for _ in range(BATCH)]).float()
    expected = 1 + scores[:, 1:].topk(N // 2).indices.sort().values
    with kernels_alone():
        kept = elip_kernels.select_tokens(scores.to(device), N // 2)
    assert torch.equal(kept.cpu(), expected)


@every_kind
@every_op
def test_two_runs_are_equal_bit_by_bit(device, name, B, dtype):
    inputs = inputs_of(name, device, B, dtype=dtype)
    first, second = (OPS[name].run(*inputs) for _ in range(2))
    assert all(map(torch.equal, first, second))


@every_kind
@every_op
def test_kernels_run_and_pytorch_does_not(device, launches, name, B, dtype):
    inputs = inputs_of(name, device, B, dtype=dtype)
    with kernels_alone():
        outputs = OPS[name].run(*inputs)
    assert launches
    assert {t.device for t in outputs} == {device}


@every_op
def test_no_output_is_left_unwritten(device, request, name):
    inputs = inputs_of(name, device, N=pick(197, TOKENS))
    expected = OPS[name].run(*inputs)
    request.getfixturevalue("poisoned_memory")
    assert_alike(OPS[name].run(*inputs), expected)


@every_op
def test_no_op_waits_for_the_device(device, name):
    inputs = inputs_of(name, device)
    expected = OPS[name].run(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = OPS[name].run(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_alike(outputs, expected)


@every_kind
@every_op
def test_a_graph_replays_forward_and_backward_on_new_inputs(device, name, B, dtype):
    run, still = OPS[name].run, inputs_of(name, device, B, dtype=dtype)
    graph, outputs = captured(run, still)
    graph.replay()
    before = [t.clone() for t in outputs]
    assert_alike(before, run(*still))
    for t, new in zip(still, inputs_of(name, device, B, dtype=dtype), strict=True):
        t.copy_(new)
    graph.replay()
    assert not any(map(torch.equal, outputs, before))
    assert_alike(outputs, run(*still))


@every_op
def test_launches_wait_for_the_current_stream(device, name):
    inputs = inputs_of(name, device, N=pick(197, TOKENS))
    expected = OPS[name].run(*inputs)
    late = [torch.zeros_like(t) for t in inputs]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles; the inputs arrive about 30 ms later
        for t, value in zip(late, inputs, strict=True):
            t.copy_(value)
        outputs = OPS[name].run(*late)
    stream.synchronize()
    assert_alike(outputs, expected)


@every_op
def test_launches_go_to_the_device_of_the_tensors(device, name):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one device only")
    next_one = (torch.cuda.current_device() + 1) % torch.cuda.device_count()
    inputs = inputs_of(name, device)
    moved = on(torch.device(device.type, next_one), inputs)
    outputs = OPS[name].run(*moved)
    assert {t.device for t in outputs} == {moved[0].device}
    assert_alike(on(device, outputs), OPS[name].run(*inputs))


@every_op
def test_the_last_image_beyond_2_31_elements(device, name):
    one = inputs_of(name, device, B=1, N=LONG)
    largest = max(t.nbytes for t in one) * LARGE_BATCH
    torch.cuda.empty_cache()  # frees the memory of earlier tests
    free = torch.cuda.mem_get_info(device)[0]
    if free < 5 * largest:
        pytest.skip(f"takes {5 * largest / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free")
    many = []
    for t in one:
        if t.is_floating_point():
            many.append(t if t.shape[0] > 1 else t.new_zeros(LARGE_BATCH, *t.shape[1:]))
            many[-1][-1] = t[-1]
        else:  # positions are valid in every image
            many.append(t[-1:].repeat(LARGE_BATCH, *[1] * (t.dim() - 1)))
    assert max(t.numel() for t in many) > BEYOND
    outputs = [t[-1:].clone() for t in OPS[name].run(*many)]
    del many
    torch.cuda.empty_cache()
    assert_alike(outputs, OPS[name].run(*one))
