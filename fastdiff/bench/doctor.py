"""What keeps a machine, and a pipeline on it, from being fast, and what to do about each of it."""

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
"""Of each picture that is drawn."""
REPORT = "report it with what fastdiff env prints"
TAKEN = "docs/pipelines.md says what is computed, and what must be diffusers' own for that"
SYSTEM = Path("/sys")


@dataclass(frozen=True)
class Finding:
    """Something that costs speed."""

    what: str
    do: str

    def __str__(self) -> str:
        return f"{self.what}; {self.do}"


def of_machine(device: str) -> list[Finding]:
    """What is wrong with the installation and the machine, for pictures drawn on `device`."""
    found = []
    if sentence := installed.clash():
        found.append(_split(sentence))
    for need in installed.unfit():
        has = "is missing" if need.found is None else f"{need.found} is installed"
        what = f"{need.package} {has}, and fastdiff takes {need.takes}"
        found.append(Finding(what, f"pip install '{need.package}{need.takes}'"))
    if lost := missing("diffusers"):
        what = f"no pipeline can be opened without {' and '.join(lost)}"
        found.append(Finding(what, installed.pip("diffusers")))
    return [*found, *(_cpu() if device == "cpu" else _gpu()), *_unused_gpu()]


def missing(extra: str) -> list[str]:
    """The packages of an extra that are not installed."""
    modules = [module for module, own in installed.EXTRAS.items() if own == extra]
    return [module for module in modules if find_spec(module) is None]


def absent() -> dict[str, list[str]]:
    """By extra that is not there, or in part: the packages that it lacks."""
    lost = {
        extra: [need.package for need in installed.needs(extra) if need.found is None]
        for extra in installed.BRINGS
    }
    return {extra: packages for extra, packages in lost.items() if packages}


def _split(sentence: str) -> Finding:
    what, _, do = sentence.partition("; ")
    return Finding(what, do)


def _cpu() -> Iterator[Finding]:
    """What keeps our C++ kernels from running, or from running on all cores."""
    kernels = native()
    if kernels["note"] is not None:
        what, _, do = kernels["note"].partition("; ")
        again = f"pip install --force-reinstall --no-deps --no-cache-dir {installed.DISTRIBUTION}"
        yield Finding(f"fastdiff._C: {what}" if not do else what, do or again)
    elif "serial" in str(kernels["isa"]):
        yield Finding(
            "our C++ kernels run on one core, for this torch has no OpenMP that they find",
            "install a torch from the index, whose libtorch_cpu.so exports GOMP_parallel",
        )
    threads, (cores, most) = torch.get_num_threads(), processors()
    if threads < cores:
        yield Finding(
            f"torch computes on {threads} of {cores} cores",
            "unset OMP_NUM_THREADS and MKL_NUM_THREADS",
        )
    if threads > most:
        yield Finding(
            f"torch computes in {threads} threads where {most} processors may be used",
            f"set OMP_NUM_THREADS={most}",
        )


def processors() -> tuple[int, int]:
    """Cores, and processors with hyper-threads, that this process may use: those of its affinity,
    as many as its control group pays for."""
    mine = os.sched_getaffinity(0)
    cores = set()
    for one in mine:
        path = SYSTEM / f"devices/system/cpu/cpu{one}/topology/thread_siblings_list"
        cores.add(path.read_text() if path.is_file() else str(one))
    try:
        quota, period = (SYSTEM / "fs/cgroup/cpu.max").read_text().split()
        paid = math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # no group of its own, or one without a limit: "max"
        paid = len(mine)
    return min(len(cores), paid), min(len(mine), paid)


def _gpu() -> Iterator[Finding]:
    """What keeps our kernels from an NVIDIA GPU that torch uses."""
    if missing("gpu"):
        yield Finding("our GPU kernels need triton, which is not installed", installed.pip("gpu"))
    elif not os.environ.get("CC") and not (shutil.which("gcc") or shutil.which("clang")):
        yield Finding(
            "Triton launches no kernel without a C compiler, and finds none",
            "install gcc, or set CC",
        )


def _unused_gpu() -> Iterator[Finding]:
    """An NVIDIA GPU that torch cannot use."""
    version = driver()
    if version is None:
        return
    if torch.version.cuda is None:
        yield Finding(
            f"torch {torch.__version__} computes on CPUs alone, beside an NVIDIA GPU",
            "install the torch with CUDA that pytorch.org names for your driver",
        )
    elif reason := refusal("cuda"):
        yield Finding(
            f"torch {torch.__version__} cannot use the NVIDIA GPU with driver {version}: {reason}",
            "update the driver, or install a torch of an older CUDA",
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
    reasons = list(_slow_parts(pipe))
    known = [reason for _, reason, _ in reasons]
    found = [Finding(f"{part} {reason}", do) for part, reason, do in reasons]
    for sentence in dict.fromkeys(said):
        if not any(reason.partition(": ")[2] in sentence for reason in known):
            found.append(Finding(sentence, REPORT))
    if again:
        found.append(
            Finding(f"a third picture of the same size had {again} recordings made anew", REPORT)
        )
    return found


def _slow_parts(pipe: Any) -> Iterator[tuple[str, str, str]]:
    """Each part that does not run as it could since it was compiled: why, after a colon, and what
    to do."""
    from fastdiff.compiler.parts import EAGER_PARTS, eager_parts, parts
    from fastdiff.compiler.pipelines import loop_of
    from fastdiff.compiler.slot import slot_of
    from fastdiff.families import plain

    for name, (module, _) in parts(pipe).items():
        if (slot := slot_of(plain(module))) is None:
            continue
        reasons = [slot.refused] if slot.refused else list(slot.eager)
        yield from ((name, f"runs eagerly: {reason}", TAKEN) for reason in reasons)
        for where in slot.promoted:
            yield name, f"computes in float32: float16 overflowed in {where}", "try --dtype bf16"
    if (loop := loop_of(pipe)) is not None:
        yield from (("the denoising loop", f"is diffusers' own: {why}", TAKEN) for why in loop.own)
    for name, why in eager_parts(pipe).items():
        if name not in EAGER_PARTS and "." not in name:
            yield name, f"runs eagerly: {why}", TAKEN


@contextmanager
def _heard() -> Iterator[list[str]]:
    """What fastdiff says within the block of what runs slower than it could."""
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
