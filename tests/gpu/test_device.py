"""Behaviour that only a device shows: launches, streams, graphs, repeatability, addresses."""

from functools import partial

import pytest
import torch

import elip_kernels
from elip_kernels._example import map_tensors, tensors_of
from tests.gpu.ops import HALF, OPS, TOKENS, assert_alike, example, kernels_alone, on, pick

pytestmark = pytest.mark.gpu
every_op = pytest.mark.parametrize("name", OPS)
# Small and large batches may use different kernels.
FULL_KINDS = [(8, torch.bfloat16), (8, torch.float32), (96, torch.bfloat16)]
KINDS = pick(FULL_KINDS, [(1, HALF)])
every_kind = pytest.mark.parametrize(("B", "dtype"), KINDS)
BATCH = pick(8, 1)
LONG, BEYOND = pick((577, 2**31), (TOKENS, 2**11))


def captured(run, arguments):
    """Capture run(arguments) after a warm-up; return the graph and the outputs of its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(arguments)
    return graph, outputs


def copy_to(arguments, others):
    """Copy the tensors of other arguments of an op to the places of the first."""
    values = (tensors_of(tuple(either.values())) for either in (arguments, others))
    for tensor, other in zip(*values, strict=True):
        tensor.copy_(other)


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
    arguments = example(name, device, B, dtype=dtype)
    first, second = (OPS[name].outputs(arguments) for _ in range(2))
    assert all(map(torch.equal, first, second))


@every_kind
@every_op
def test_kernels_run_and_pytorch_does_not(device, launches, name, B, dtype):
    arguments = example(name, device, B, dtype=dtype)
    with kernels_alone():
        outputs = OPS[name].outputs(arguments)
    assert launches
    assert {t.device for t in outputs} == {device}


@every_op
def test_no_output_is_left_unwritten(device, request, name):
    arguments = example(name, device, BATCH, pick(197, TOKENS))
    expected = OPS[name].outputs(arguments)
    request.getfixturevalue("poisoned_memory")
    assert_alike(OPS[name].outputs(arguments), expected)


@every_op
def test_no_op_waits_for_the_device(device, name):
    arguments = example(name, device, BATCH)
    expected = OPS[name].outputs(arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = OPS[name].outputs(arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_alike(outputs, expected)


@every_kind
@every_op
def test_a_graph_replays_forward_and_backward_on_new_inputs(device, name, B, dtype):
    run, still = OPS[name].outputs, example(name, device, B, dtype=dtype)
    graph, outputs = captured(run, still)
    graph.replay()
    before = [t.clone() for t in outputs]
    assert_alike(before, run(still))
    copy_to(still, example(name, device, B, dtype=dtype))
    graph.replay()
    assert not torch.equal(outputs[0], before[0])
    assert_alike(outputs, run(still))


@every_op
def test_launches_wait_for_the_current_stream(device, name):
    arguments = example(name, device, BATCH, pick(197, TOKENS))
    expected = OPS[name].outputs(arguments)
    late = map_tensors(torch.zeros_like, arguments)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles; the inputs arrive about 30 ms later
        copy_to(late, arguments)
        outputs = OPS[name].outputs(late)
    stream.synchronize()
    assert_alike(outputs, expected)


@every_op
def test_launches_go_to_the_device_of_the_tensors(device, name):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one device only")
    next_one = (torch.cuda.current_device() + 1) % torch.cuda.device_count()
    arguments = example(name, device, BATCH)
    other = torch.device(device.type, next_one)
    moved = map_tensors(lambda t: t.to(other), arguments)
    outputs = OPS[name].outputs(moved)
    assert {t.device for t in outputs} == {t.device for t in tensors_of(tuple(moved.values()))}
    assert_alike(on(device, outputs), OPS[name].outputs(arguments))


def as_last_of(images, tensor):
    """Return a tensor of one image as the last of many; parameters stay as they are."""
    if tensor.shape[0] > 1:
        return tensor
    if not tensor.is_floating_point():  # positions are valid in every image
        return tensor.repeat(images, *[1] * (tensor.dim() - 1))
    many = tensor.new_zeros(images, *tensor.shape[1:])
    many[-1] = tensor[0]
    return many


@every_op
def test_the_last_image_beyond_2_31_elements(device, name):
    one = example(name, device, 1, LONG)
    of_image = [t for t in tensors_of(tuple(one.values())) if t.shape[0] == 1]
    images = BEYOND // max(t.numel() for t in of_image) + 1
    largest = max(t.nbytes for t in of_image) * images
    torch.cuda.empty_cache()  # frees the memory of earlier tests
    free = torch.cuda.mem_get_info(device)[0]
    if free < 5 * largest:
        pytest.skip(f"takes {5 * largest / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free")
    many = map_tensors(partial(as_last_of, images), one)
    assert max(t.numel() for t in tensors_of(tuple(many.values()))) > BEYOND
    outputs = [t[-1:].clone() for t in OPS[name].outputs(many)]
    del many
    torch.cuda.empty_cache()
    assert_alike(outputs, OPS[name].outputs(one))
