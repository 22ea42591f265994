"""The stand-in for a GPU refuses what CUDA refuses."""

import pytest
import torch

from fastdiff.kernels.conv2d import cudnn
from fastdiff.kernels.linear import linear


def capture(function, stream=None, pool=None):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream or torch.cuda.Stream()):
        out = function()
    return graph, out


def test_a_capture_computes_nothing_and_a_replay_does(gpu):
    x, total = torch.ones(4), torch.zeros(4)

    def function():
        y = x * 2
        total.add_(y)
        return y

    graph, y = capture(function)
    assert y.isnan().all()
    assert (total == 0).all()
    x.fill_(3)
    graph.replay()
    graph.replay()
    assert (y == 6).all()
    assert (total == 12).all()


REFUSED = {
    "an item": lambda x: x.sum().item(),
    "a comparison": lambda x: torch.equal(x, x),
    "an index of unknown length": lambda x: x[x > 0].nonzero(),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "an event": lambda x: torch.cuda.current_stream().record_event().synchronize(),
    "memory given back": lambda x: torch.cuda.empty_cache(),
    "an event from outside": lambda x: torch.cuda.current_stream().wait_stream(OTHER[0]),
    "memory outside of the pool": lambda x: outside(x),
    "a kernel that is not loaded": lambda x: linear(x, torch.ones_like(x)),
    "a search": lambda x: convolved(x),
}
OTHER = []


def outside(x):
    with torch.cuda.stream(OTHER[0]):
        return x + 1


def convolved(x):
    weight = x.new_ones(1, 1, 1, 1)
    return torch.cudnn_convolution(
        x[None, None],
        weight,
        padding=(0, 0),
        stride=(1, 1),
        dilation=(1, 1),
        groups=1,
        benchmark=True,
        deterministic=True,
        allow_tf32=True,
    )


@pytest.mark.parametrize("what", REFUSED)
def test_a_capture_refuses(gpu, what):
    OTHER[:] = [torch.cuda.Stream()]
    x = torch.ones(4, 4)
    OTHER[0].wait_stream(gpu.default)
    current, handle = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
    with pytest.raises(RuntimeError, match="previous error") as error:
        capture(lambda: REFUSED[what](x), pool=handle)
    assert "not permitted when stream is capturing" in str(error.value.__context__)
    assert torch.cuda.current_stream() is not current  # torch does not reset it, nor the allocator
    torch._C._cuda_endAllocateToPool(0, handle)
    REFUSED[what](x)  # outside of a capture it is allowed


def test_a_capture_refuses_copies_from_and_to_the_host(gpu):
    x, host = torch.ones(4), gpu.on_host(torch.zeros(4))
    handle = torch.cuda.graph_pool_handle()
    for copy in (lambda: x.copy_(host), lambda: host.copy_(x)):
        with pytest.raises(RuntimeError, match="previous error") as error:
            capture(copy, pool=handle)
        assert "host" in str(error.value.__context__)
        torch._C._cuda_endAllocateToPool(0, handle)
        copy()


def test_unordered_streams_race(gpu):
    x, other = torch.ones(4), torch.cuda.Stream()
    x.add_(1)
    with torch.cuda.stream(other):
        with pytest.raises(RuntimeError, match="race"):
            x + 1
        other.wait_stream(gpu.default)
        x + 1
    with pytest.raises(RuntimeError, match="race"):
        x.add_(1)
    other.synchronize()
    x.add_(1)


def test_freed_memory_is_used_again_on_its_stream(gpu):
    x, other = torch.ones(1000), torch.cuda.Stream()
    other.wait_stream(gpu.default)
    with torch.cuda.stream(other):
        y = x + 1
        assert y.sum() == 2000
        x + 1
    del x
    with pytest.raises(RuntimeError, match="race"):
        torch.zeros(1000)


def test_a_graph_knows_memory_by_its_address(gpu):
    tensors = [torch.ones(1000)]
    graph, _ = capture(lambda: tensors[0] + 1)
    graph.replay()
    tensors.clear()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        graph.replay()


def test_resetting_a_graph_frees_the_workspaces_of_its_stream(gpu):
    a, stream, pool = torch.ones(8, 8), torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    stream.wait_stream(gpu.default)
    with torch.cuda.stream(stream):
        a @ a
    first, _ = capture(lambda: a @ a, stream, pool)
    second, _ = capture(lambda: a @ a, stream, pool)
    second.replay()
    first.reset()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        second.replay()


def test_graphs_of_one_pool_race(gpu):
    x, other, pool = torch.ones(4), torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    graphs = [capture(lambda: x + 1, pool=pool)[0] for _ in range(2)]
    graphs[0].replay()
    with torch.cuda.stream(other):
        with pytest.raises(RuntimeError, match="race"):
            graphs[1].replay()
        other.wait_stream(gpu.default)
        graphs[1].replay()


def test_memory_runs_out(gpu):
    gpu.capacity = gpu.reserved() + 5000
    x = torch.ones(1000)
    with pytest.raises(torch.OutOfMemoryError):
        torch.ones(1000)
    del x
    torch.ones(1200)  # free blocks are given back before memory runs out


def test_a_pool_without_graphs_is_refused_while_a_tensor_in_it_is_held(gpu):
    x, pool = torch.ones(4), torch.cuda.graph_pool_handle()
    graph, y = capture(lambda: x + 1, pool=pool)
    del graph
    with pytest.raises(RuntimeError, match="use_count > 0"):
        capture(lambda: x + 1, pool=pool)
    del y
    capture(lambda: x + 1, pool=pool)


def test_a_plan_made_without_a_search_prevents_a_search_with_the_same_flags(gpu):
    x, weight = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1)

    def convolve(**flags):
        torch.cudnn_convolution(x, weight, padding=(0, 0), stride=(1, 1), **flags)
        return len(gpu.searches)

    assert convolve(benchmark=False, deterministic=False) == 0
    assert convolve(benchmark=True, deterministic=False) == 0
    assert convolve(benchmark=True, deterministic=True) == 1
    assert convolve(benchmark=False, deterministic=True) == 1
    assert not cudnn.SEARCHED
