"""What keeps a machine, and a pipeline on it, from being fast, and what to do about each cause."""

import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastdiff import installed
from fastdiff.bench.machine import driver, native
from fastdiff.devices import refusal
from fastdiff.errors import UserError

STEPS = 2
"""Denoising steps of each picture that is drawn."""
REPORT = "report it with what fastdiff env prints"
TAKEN = "docs/pipelines.md lists what fastdiff computes, and under which conditions"
SYSTEM = Path("/sys")


@dataclass(frozen=True)
class Finding:
    """Something that costs speed."""

    what: str
    do: str
    """What to do about it."""
    blocks: bool = False
    """Whether no pipeline can draw until it is fixed."""

    def __str__(self) -> str:
        return f"{self.what}; {self.do}"


def of_machine(device: str) -> list[Finding]:
    """What is wrong with the installation and the machine, for pictures drawn on `device`."""
    found = []
    if sentence := installed.clash():
        found.append(_split(sentence))
    if lost := missing("diffusers"):
        what = f"no pipeline can be opened without {' and '.join(lost)}"
        found.append(Finding(what, installed.pip("diffusers"), blocks=True))
    for extra in ("", "diffusers", *(() if device == "cpu" else ("gpu",))):
        for need in installed.needs(extra):
            if need.found and not need.fits:
                what = f"{need.package} {need.found} is installed, but fastdiff needs {need.takes}"
                found.append(Finding(what, f"pip install '{need.package}{need.takes}'"))
    on_device = _threads() if device == "cpu" else _triton()
    return [*found, *_native(device), *on_device, *_unused_gpu()]


def missing(extra: str) -> list[str]:
    """The packages of an extra that are not installed."""
    modules = [module for module, own in installed.EXTRAS.items() if own == extra]
    return [module for module in modules if find_spec(module) is None]


def absent() -> dict[str, list[str]]:
    """The missing packages of each extra that is not, or not completely, installed."""
    lost = {
        extra: [str(need) for need in installed.needs(extra) if not need.fits]
        for extra in installed.BRINGS
    }
    return {extra: needs for extra, needs in lost.items() if needs}


def _split(sentence: str) -> Finding:
    what, _, do = sentence.partition("; ")
    return Finding(what, do)


def _native(device: str) -> Iterator[Finding]:
    """What keeps our C++ kernels from running, or from running on all cores."""
    kernels = native()
    note, on_cpu = kernels["note"], device == "cpu"
    if note is not None and "; " not in note:  # "built, but does not load: …": nothing can run
        again = f"pip install --force-reinstall --no-deps --no-cache-dir {installed.DISTRIBUTION}"
        yield Finding(f"fastdiff._C is {note}", again, blocks=True)
    elif note is not None and on_cpu:
        yield _split(note)
    elif on_cpu and "serial" in str(kernels["isa"]):
        yield Finding(
            "our C++ kernels run on one core because this torch has no OpenMP that they can use",
            "install torch from the package index or pytorch.org, which exports GOMP_parallel",
        )


def _threads() -> Iterator[Finding]:
    """A number of torch's threads, which our kernels use, that does not fit the cores."""
    threads, (cores, most) = torch.get_num_threads(), processors()
    if threads < cores:
        yield Finding(
            f"torch computes on {threads} of {cores} cores",
            "unset OMP_NUM_THREADS and MKL_NUM_THREADS",
        )
    if threads > most:
        yield Finding(
            f"torch computes in {threads} threads, but only {most} can run at once",
            f"set OMP_NUM_THREADS={most}",
        )


def processors() -> tuple[int, int]:
    """The cores, and the processors including hyper-threads, that this process may use: those of
    its affinity, up to the limit of its control group."""
    mine = os.sched_getaffinity(0)
    cores = set()
    for one in mine:
        path = SYSTEM / f"devices/system/cpu/cpu{one}/topology/thread_siblings_list"
        cores.add(path.read_text() if path.is_file() else str(one))
    try:
        quota, period = (SYSTEM / "fs/cgroup/cpu.max").read_text().split()
        paid = math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # no control group, or one without a limit: "max"
        paid = len(mine)
    return min(len(cores), paid), min(len(mine), paid)


def _triton() -> Iterator[Finding]:
    """What keeps our kernels from an NVIDIA GPU that torch uses."""
    if missing("gpu"):
        yield Finding("our GPU kernels need triton, which is not installed", installed.pip("gpu"))
    elif not os.environ.get("CC") and not (shutil.which("gcc") or shutil.which("clang")):
        yield Finding(
            "Triton needs a C compiler to launch kernels, and there is none",
            "install gcc, or set CC",
        )


def _unused_gpu() -> Iterator[Finding]:
    """An NVIDIA GPU that torch cannot use."""
    version = driver()
    if version is None:
        return
    if torch.version.cuda is None:
        yield Finding(
            f"there is an NVIDIA GPU, but torch {torch.__version__} computes on CPUs only",
            "install the torch with CUDA that pytorch.org lists for your driver",
        )
    elif reason := refusal("cuda"):
        yield Finding(
            f"torch {torch.__version__} cannot use the NVIDIA GPU with driver {version}: {reason}",
            "update the driver, or install a torch for an older CUDA",
        )


def of_pipeline(pipe: Any, height: int, width: int) -> list[Finding]:
    """What runs slower than it could when `pipe` draws: compiles it, and draws three pictures of
    two steps. Sides in pixels."""
    from fastdiff.bench.timing import picture
    from fastdiff.compiler import compile
    from fastdiff.runtime import recordings

    with _heard() as said:
        try:
            compile(pipe)
        except UserError as error:
            return [Finding(str(error), TAKEN)]
        for _ in range(2):  # a decoder is recorded when it is called again
            picture(pipe, height, width, STEPS, output_type="pt")
        before = recordings.made()
        picture(pipe, height, width, STEPS, output_type="pt")
        again = recordings.made() - before
    found = {one.what: one for one in _slow_parts(pipe)}
    for sentence in said:  # such as why a CUDA graph could not be captured
        found.setdefault(sentence, Finding(sentence, REPORT))
    if again:
        what = f"a third picture of the same size needed a new recording ({again})"
        found[what] = Finding(what, REPORT)
    return list(found.values())


def _slow_parts(pipe: Any) -> Iterator[Finding]:
    """Each part that did not run as it could since it was compiled."""
    from fastdiff.compiler.loop_state import loop_of
    from fastdiff.compiler.parts import EAGER_PARTS, eager_parts, parts
    from fastdiff.compiler.slot import slot_of
    from fastdiff.families import plain

    for name, (module, _) in parts(pipe).items():
        if (slot := slot_of(plain(module))) is None:
            continue
        reasons = [slot.refused] if slot.refused else list(slot.eager)
        yield from (Finding(f"{name} runs eagerly: {reason}", TAKEN) for reason in reasons)
        for where in slot.promoted:
            what = f"{name} computes in float32 because float16 overflowed in {where}"
            yield Finding(what, "try --dtype bf16")
    if (loop := loop_of(pipe)) is not None:
        yield from (Finding(f"the loop is diffusers' own: {why}", TAKEN) for why in loop.own)
    for name, why in eager_parts(pipe).items():
        if name not in EAGER_PARTS and "." not in name:
            yield Finding(f"{name} runs eagerly: {why}", TAKEN)


@contextmanager
def _heard() -> Iterator[list[str]]:
    """The warnings that fastdiff logs within the block."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage().removeprefix("fastdiff: "))

    listener, logger = Listener(logging.WARNING), logging.getLogger("fastdiff")
    spreads, logger.propagate = logger.propagate, False
    logger.addHandler(listener)
    try:
        yield said
    finally:
        logger.removeHandler(listener)
        logger.propagate = spreads
