"""CUDA graphs on the stand-in for a GPU: results are right whatever is freed, fails, or runs at the
same time."""

import copy
import threading
import time
import warnings
from concurrent.futures import Future

import pytest
import torch
from torch.nn import functional as F

import fastdiff
from fastdiff.errors import UserError
from fastdiff.kernels.conv2d import conv2d, cudnn
from fastdiff.kernels.conv2d.spec import Arguments
from fastdiff.kernels.dispatch import KERNELS, all_kernels
from fastdiff.kernels.linear import linear
from fastdiff.runtime import graphs, recordings, tactics
from fastdiff.runtime.graphs import NotCaptured
from fastdiff.runtime.recordings import Recorded, buffer, record

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def work(x):
    """A kernel of ours and a product of cuBLAS."""
    return torch.mm(linear(x, WEIGHT), WEIGHT) + 1


WEIGHT, KERNEL = torch.ones(8, 8), torch.randn(3, 4, 3, 3)


def given(rows, columns=8, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def recorded(function=work, *shapes):
    """A `Recorded` that has graphs for `shapes`."""
    made = Recorded(function)
    for rows in shapes:
        made(given(rows))
        made(given(rows))
    return made


def kept(made):
    return [None if value is None else key[0][0][0] for key, value in made._kept._values.items()]


def test_a_graph_gives_what_the_function_gives(gpu):
    made, before = recorded(work, 2, 3), recordings.made()
    for rows in (2, 3, 2):
        x = given(rows, seed=rows)
        first, second = made(x), made(x)
        assert torch.equal(first, work(x))
        assert torch.equal(first, second)
    assert recordings.made() == before
    assert kept(made) == [3, 2]


def test_other_graphs_work_after_one_is_evicted(gpu, monkeypatch):
    """The others use the same cuBLAS workspace, which torch clears by stream."""
    monkeypatch.setattr(recordings, "SHAPES", 2)
    made = recorded(work, 2, 3, 4)
    assert kept(made) == [3, 4]
    x = given(3, seed=1)
    assert torch.equal(made(x), work(x))


def test_workspaces_of_graphs_are_in_their_pool(gpu):
    made = recorded(work, 2)
    (graph,) = (recording.graph for _, recording in made._kept._values.values())
    assert all(memory is graph.pool.memory for memory in graph.workspaces)
    assert len(graph.workspaces) == 2
    gpu.workspaces.clear()  # as inductor's graphs do
    assert torch.equal(made(given(2)), work(given(2)))


def test_memory_of_an_evicted_graph_is_not_given_to_another_stream(gpu, monkeypatch):
    monkeypatch.setattr(recordings, "SHAPES", 1)
    made, other = recorded(work, 200), torch.cuda.Stream()
    other.wait_stream(gpu.default)
    with torch.cuda.stream(other):
        late = made(given(200))
    recorded_size = given(200).nbytes
    for _ in range(2):
        made(given(3))  # the graph for 200 rows is evicted while it may be running
    fresh = torch.empty(recorded_size, dtype=torch.uint8).fill_(7)
    other.synchronize()
    assert torch.equal(late, work(given(200)))
    assert (fresh == 7).all()


def test_threads_draw_on_streams_of_their_own(gpu):
    made, wrong = Recorded(work), []
    recorded_before = [made(given(rows)) for rows in (2, 3)]
    assert len(recorded_before) == 2

    def draw(seed):
        try:
            with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
                for i in range(20):
                    x = given(2 + i % 2, seed=seed)
                    if not torch.equal(made(x), expected[seed, 2 + i % 2]):
                        wrong.append(seed)
        except RuntimeError as error:
            wrong.append(error)

    expected = {(seed, rows): work(given(rows, seed=seed)) for seed in (1, 2) for rows in (2, 3)}
    torch.cuda.synchronize()
    threads = [gpu.run(draw, seed) for seed in (1, 2)]
    for thread in threads:
        thread.join()
    assert not wrong
    assert sorted(kept(made)) == [2, 3]


def test_graphs_on_two_streams_take_turns(gpu):
    """They share their memory, and the host does not wait between them."""
    made, streams = recorded(work, 2, 3), (torch.cuda.Stream(), torch.cuda.Stream())
    given_before = [given(rows, seed=rows) for rows in (2, 3)]
    torch.cuda.synchronize()
    results = []
    for stream, x in zip(streams, given_before, strict=True):
        with torch.cuda.stream(stream):
            results.append(made(x))
    torch.cuda.synchronize()
    for result, x in zip(results, given_before, strict=True):
        assert torch.equal(result, work(x))


def waits(x):
    """The host reads a number: no graph can hold it."""
    return work(x) * float(x.abs().max() > 0)


def test_a_function_that_waits_runs_without_a_graph_and_says_where(gpu):
    made, x, stream = Recorded(waits), given(2), torch.cuda.current_stream()
    made(x)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            assert torch.equal(made(x), waits(x))
        assert len(warned) == (1 if _ == 0 else 0)
        if warned:
            assert "the host waits, in `return work(x) * float(x.abs().max() > 0)`" in str(
                warned[0].message
            )
    assert torch.cuda.current_stream() is stream
    assert not gpu.underway
    assert all(pool.used_by == 0 for pool in gpu.pools.values())


def test_the_reason_is_not_an_error_that_was_being_handled(gpu):
    try:
        raise RuntimeError("another error")
    except RuntimeError:
        with pytest.warns(RuntimeWarning, match="without a CUDA graph: CUDA error: .*host waits"):
            assert record(waits, (buffer((2, 8), torch.float32, CPU),)) is None


def test_graphs_work_after_a_failed_capture(gpu):
    made = recorded(work, 2)
    with pytest.warns(RuntimeWarning, match="without a CUDA graph"):
        recorded(waits, 5)
    made(given(3))
    for rows in (3, 2, 3):
        x = given(rows, seed=5)
        assert torch.equal(made(x), work(x))
    assert kept(made) == [2, 3]


def test_graphs_from_before_and_after_a_failed_capture_take_turns(gpu):
    """One thread waits for its turn while a capture fails; another comes afterwards."""
    made, threads, wrong = recorded(work, 2, 3), [], []

    def draw():
        try:
            with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
                made(given(2))
        except RuntimeError as error:
            wrong.append(error)

    def fails(x):
        if not threads:
            threads.append(gpu.run(draw))
            while graphs._POOLS[CPU].lock.locked() and not asked.wait(0.01):
                pass
        return waits(x)

    asked = threading.Event()
    pool = graphs._POOLS[CPU]
    lock = pool.lock

    class Lock:
        """Sets `asked` when a second thread asks for the lock."""

        def __enter__(self):
            if lock.locked():
                asked.set()
            lock.acquire()

        def __exit__(self, *_):
            lock.release()

        def locked(self):
            return lock.locked()

    pool.lock = Lock()
    with pytest.warns(RuntimeWarning, match="without a CUDA graph"):
        record(fails, (buffer((2, 8), torch.float32, CPU),))
    threads[0].join()
    made(given(3))  # without turns it would run at the same time as the thread's graph
    assert not wrong


def test_a_kernel_that_fails_leaves_nothing_behind(gpu):
    for at in (2, 3, 4):  # in the first warm-up, in the second, in the capture
        calls = iter(range(1, 100))

        def fails(x, calls=calls, at=at):
            if next(calls) == at:
                raise ValueError("a kernel failed")
            return work(x)

        made, x = Recorded(fails), given(2)
        made(x)
        with pytest.raises(ValueError, match="a kernel failed"):
            made(x)
        assert torch.cuda.current_stream() is gpu.default
        assert torch.equal(made(x), work(x))
        assert kept(made) == [2]


def test_a_graph_that_is_too_large_leaves_no_memory_in_the_pool(gpu, monkeypatch):
    small = recorded(work, 2)
    before = [pool.largest for pool in gpu.pools.values()]
    monkeypatch.setattr(recordings, "BYTES", 10_000)
    made = recorded(work, 400)
    assert kept(made) == [None]
    assert [pool.largest for pool in gpu.pools.values()] == before
    assert torch.equal(small(given(2)), work(given(2)))


def test_graphs_of_other_shapes_are_evicted_when_memory_runs_out(gpu):
    made = recorded(work, 200)
    torch.cuda.empty_cache()
    x = given(199)
    made(x)
    expected = work(x)
    torch.cuda.empty_cache()
    gpu.capacity = gpu.reserved() + int(2.5 * x.nbytes)  # a graph takes four times as much
    assert torch.equal(made(x), expected)
    assert kept(made) == [199]


def test_calls_run_without_a_graph_if_there_is_no_memory_for_one(gpu):
    made, x = Recorded(work), given(200)
    made(x)
    expected = work(x)
    torch.cuda.empty_cache()
    gpu.capacity = gpu.reserved() + int(2.5 * x.nbytes)
    for _ in range(2):
        assert torch.equal(made(x), expected)
    assert not made._kept._values
    assert not gpu.underway
    gpu.capacity *= 4
    made(x)
    assert kept(made) == [200]


def test_an_output_may_outlive_the_last_graph(gpu):
    """torch refuses a pool whose graphs are all gone while a tensor in it is still held."""
    recording = record(work, (buffer((2, 8), torch.float32, CPU).fill_(1),))
    output = recording.run()
    del recording
    assert record(work, (buffer((3, 8), torch.float32, CPU),)) is not None
    assert torch.equal(output, work(torch.ones(2, 8)))


# --- tactics ---


def convolved(x):
    return conv2d(x, KERNEL, KERNEL[:, 0, 0, 0])


def picture(seed=0):
    return torch.randn(1, 6, 6, 4, generator=torch.Generator().manual_seed(seed))


def test_cudnn_searches_once_and_keeps_the_plan(gpu):
    x = picture()
    torch.cudnn_convolution(  # eagerly, without a search, with the same arguments
        x.permute(0, 3, 1, 2),
        KERNEL,
        padding=(1, 1),
        stride=(1, 1),
        dilation=(1, 1),
        groups=1,
        benchmark=False,
        deterministic=False,
        allow_tf32=True,
    )
    made = Recorded(convolved)
    first = made(x)
    assert len(gpu.searches) == 1
    others = [made(x) for _ in range(3)]
    there = []
    gpu.run(lambda: there.append(made(x))).join()
    again = Recorded(convolved)
    assert all(torch.equal(first, other) for other in (*others, *there, again(x), again(x)))
    assert len(gpu.searches) == 1
    by_rule = F.conv2d(x.permute(0, 3, 1, 2), KERNEL, KERNEL[:, 0, 0, 0], padding=1)
    assert not torch.equal(first, by_rule.permute(0, 2, 3, 1))
    assert kept(made) == [1]


def test_a_second_loop_at_the_same_time_uses_the_same_plans(gpu):
    made, x = Recorded(convolved), picture()
    first = made(x)
    with made._lock:
        assert torch.equal(made(x), first)
    assert len(gpu.searches) == 1


def test_convolutions_that_fill_the_gpu_are_not_searched(gpu):
    weight = torch.randn(128, 1, 1, 1)
    with cudnn.searching():
        for rows, searched in ((128 * 264, 0), (128 * 263, 1)):
            cudnn.run(Arguments(torch.randn(1, rows, 1, 1), weight, None, 1, [0, 0]))
            assert len(gpu.searches) == len(cudnn.SEARCHED) == searched


@pytest.mark.parametrize("how", ["option", "cudnn", "torch"])
def test_nothing_is_searched_where_it_is_not_wanted(gpu, monkeypatch, how):
    if how == "cudnn":
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    if how == "torch":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    made, x = Recorded(convolved, searches=how != "option"), picture()
    by_rule = F.conv2d(x.permute(0, 3, 1, 2), KERNEL, KERNEL[:, 0, 0, 0], padding=1)
    for _ in range(3):
        assert torch.equal(made(x), by_rule.permute(0, 2, 3, 1))
    assert not gpu.searches


# --- a pipeline ---


def draw(pipe, prompt="red heart", steps=2, size=32, **options):
    generator = torch.Generator().manual_seed(1)
    call = {"num_inference_steps": steps, "guidance_scale": 4.0, "output_type": "np"}
    return torch.as_tensor(
        pipe(prompt, height=size, width=size, generator=generator, **call, **options).images
    )


@pytest.fixture
def pipe(gpu, demo):
    with torch.inference_mode(False):
        return fastdiff.compile(copy.deepcopy(demo))


def test_pictures_are_drawn_by_graphs(gpu, pipe, demo):
    first = draw(pipe)
    assert (first - draw(demo)).abs().max() < 1e-3  # each plan gives other last bits
    before = recordings.made()
    other = draw(pipe, "blue star", steps=5)
    assert recordings.made() == before + 1  # the decoder is recorded at its second picture
    assert torch.equal(first, draw(pipe))
    assert torch.equal(other, draw(pipe, "blue star", steps=5))
    assert torch.equal(first, draw(pipe))
    assert recordings.made() == before + 1
    assert "small convolutions use the plan that cuDNN found fastest" in str(fastdiff.report(pipe))


def test_evicted_sizes_are_recorded_again(gpu, pipe, monkeypatch):
    monkeypatch.setattr(recordings, "SHAPES", 2)
    sizes = (32, 16, 24)
    first = {size: draw(pipe, size=size) for size in sizes}
    for size in (*sizes, sizes[0]):  # two sizes are kept: each of these was evicted before
        assert torch.equal(draw(pipe, size=size), first[size])


def test_a_lora_is_switched_off_and_on(gpu, pipe):
    from peft import LoraConfig

    draw(pipe)
    first = draw(pipe)
    pipe.unet.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "one"
    )
    changed = draw(pipe)
    assert not torch.equal(first, changed)
    made = recordings.made()
    pipe.unet.disable_adapters()
    assert torch.equal(draw(pipe), first)
    pipe.unet.enable_adapters()
    assert torch.equal(draw(pipe), changed)
    assert recordings.made() == made  # rewritten in place


def test_a_restored_pipeline_is_eager_again(gpu, pipe, demo):
    eager = draw(demo)
    draw(pipe)
    draw(pipe)
    fastdiff.restore(pipe)
    assert torch.equal(draw(pipe), eager)
    del pipe
    fastdiff.compile(again := copy.deepcopy(demo))
    assert torch.equal(draw(again), draw(again))


def test_without_tactics(gpu, demo):
    pipe = fastdiff.compile(copy.deepcopy(demo), tactics=False)
    draw(pipe)
    draw(pipe)
    assert not gpu.searches
    assert "Options.tactics is off" in str(fastdiff.report(pipe))
    with pytest.raises(UserError, match="other tactics already"):
        fastdiff.compile(pipe)


def test_pictures_of_two_threads(gpu, pipe):
    alone, wrong = draw(pipe), []

    def work():
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(2):
                    if not torch.equal(draw(pipe), alone):
                        wrong.append("the picture differs")
        except RuntimeError as error:
            wrong.append(error)

    torch.cuda.synchronize()
    for thread in [gpu.run(work) for _ in range(2)]:
        thread.join()
    assert not wrong


# --- timing kernels ---


def test_a_reference_that_waits_is_named_and_the_next_is_timed(gpu, monkeypatch):
    from fastdiff.bench import kernels as bench

    monkeypatch.setattr(bench, "_flush", lambda device: torch.empty(16))
    kernel = all_kernels()["guided_step"]
    case = kernel.spec.cases[0]
    (inputs,) = bench.inputs_of(kernel, case, torch.float32, CPU)
    with pytest.raises(NotCaptured, match="in `index = int\\(a.step\\)`"):
        bench._by_events([lambda: kernel.spec.reference(**inputs)])
    assert torch.cuda.current_stream() is gpu.default
    assert gpu.warns == "default"
    x = given(2)
    assert bench._by_events([lambda: work(x), lambda: work(x)])() == 0.5
    assert KERNELS["guided_step"] is kernel


def test_an_interrupted_thread_keeps_its_turn_until_the_work_is_done(gpu, monkeypatch):
    """After Ctrl-C while the worker thread captures, no other thread may use the memory yet."""
    done = []

    class Interrupted(Future):
        def result(self, timeout=None):
            raise KeyboardInterrupt

    class Executor:
        def submit(self, run, *args):
            future = Interrupted()

            def work():
                time.sleep(0.2)
                done.append(True)
                future.set_result(None)

            threading.Thread(target=work).start()
            return future

    monkeypatch.setattr(tactics, "_THREAD", Executor())
    with pytest.raises(KeyboardInterrupt):
        tactics.run(work, given(2))
    assert done
