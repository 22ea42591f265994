"""Times one picture on two ranks, and on one with all their cores: `python -m benchmarks.ranks`.

Two processes of half the threads each compute one half of guidance (`Options(parallel="guidance")`,
gloo on a CPU, NCCL with two GPUs); one process has all threads, or one GPU. They draw in turn, in
random order, and the others wait without computing. The pictures are compared.
"""

import argparse
import os
import random
import socket
import subprocess
import sys
import time
from typing import Any

import numpy as np


def worker(given: argparse.Namespace) -> None:
    """Draw whenever a line comes, and print the seconds and the picture's sum."""
    import torch

    import fastdiff
    from fastdiff.bench.source import Source, opened
    from fastdiff.runtime.ranks import joined

    torch.set_num_threads(given.threads)
    device, parallel = given.device, None
    if "RANK" in os.environ:
        _, device = joined(device)
        parallel = "guidance"
    source = Source(preset=given.preset, scale=given.scale)
    pipe: Any = opened(source, getattr(torch, given.dtype), device).to(device)
    pipe.set_progress_bar_config(disable=True)
    fastdiff.compile(pipe, parallel=parallel)
    for _ in sys.stdin:
        start = time.perf_counter()
        latents = pipe(
            "red heart",
            num_inference_steps=given.steps,
            guidance_scale=4.0,
            height=given.size,
            width=given.size,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        print(seconds, *latents.double().flatten().tolist()[:64], flush=True)


def begin(given: argparse.Namespace, threads: int, **variables: str) -> subprocess.Popen[str]:
    """A worker; it has loaded nothing yet."""
    command = [sys.executable, "-m", "benchmarks.ranks", "--worker", "--threads", str(threads)]
    for name in ("preset", "scale", "size", "steps", "dtype", "device"):
        if (value := getattr(given, name)) is not None:
            command += [f"--{name}", str(value)]
    return subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)} | variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def draw(workers: list[subprocess.Popen[str]]) -> tuple[float, np.ndarray]:
    """One picture by these together: the slowest one's seconds, and the first latents."""
    for one in workers:
        assert one.stdin is not None
        one.stdin.write("draw\n")
        one.stdin.flush()
    told = []
    for one in workers:
        assert one.stdout is not None
        told.append([float(number) for number in one.stdout.readline().split()])
    return max(numbers[0] for numbers in told), np.array(told[0][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", help="as of fastdiff bench; default: the demo")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--size", type=int, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2, help="of one rank")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given)
        return
    from fastdiff.bench.stats import speedup

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    one = [begin(given, given.threads)]
    half = max(1, given.threads // 2)
    two = [begin(given, half, **shared, RANK=str(r), LOCAL_RANK=str(r)) for r in (0, 1)]
    try:
        for _ in range(2):  # as it is, then recorded
            _, first = draw(one)
            _, second = draw(two)
        times: dict[str, list[float]] = {"one": [], "two": []}
        for _ in range(given.rounds):
            for name, workers in random.sample([("one", one), ("two", two)], 2):
                times[name].append(draw(workers)[0])
        apart = np.abs(first - second).max() / np.abs(first).max()
        ratio = speedup(times["one"], times["two"])
        print(f"one rank, {given.threads} threads: {np.median(times['one']):.3f} s")
        print(f"two ranks, {half} threads each: {np.median(times['two']):.3f} s")
        print(f"two ranks are {ratio.median:.2f} [{ratio.lo:.2f}, {ratio.hi:.2f}] × one;", end=" ")
        print(f"latents differ by {apart:.1e} of the largest")
    finally:
        for process in (*one, *two):
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


if __name__ == "__main__":
    main()
