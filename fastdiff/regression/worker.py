"""Runs in the interpreter of either state and times what it is asked to: `python -P worker.py`.

This file is the driver's, not the state's. From the state it imports only what users import and
what `bench` has had since its first release. It reads a line of JSON and answers with one:

    {"suite": …, …}           the settings, once         -> {"versions": …}
    {"do": "start"}           fork a new process         -> {"groups": [[row, …], …], …}
    {"do": "run", "group": i} time the group's rows      -> {"ms": {row: milliseconds}}
    {"do": "check"}           are the results right?     -> {"wrong": {row: why}}
    {"do": "count"}           count what does not vary   -> {"counts": {name: [value, unit]}}
    {"do": "stop"}            end that process           -> {}

Everything is imported before the first fork, so that a new process only pays for its preparation.
Nothing is computed before it, since neither CUDA nor a thread pool survives a fork.
"""

import gc
import json
import os
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

GUIDANCE_SCALE, PROMPT = 4.0, "red heart"
CHECKED_STEPS = 2
"""Steps of the picture that is compared with float64; its last step is checked separately, too."""


def denoiser(pipe: Any) -> Any:
    """The network that a pipeline's loop repeats."""
    # without fastdiff.recipes: a state may be older than that, or have no fastdiff
    return getattr(pipe, "transformer", None) or pipe.unet


class Pipelines:
    """Pictures by each backend: steps up to the latents, decoding, and the preparation."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch
        from diffusers import DiffusionPipeline

        self.settings, self.torch, self.reader = settings, torch, DiffusionPipeline
        self.backends = {name: _backend(name) for name in settings["backends"]}
        self.pipes: dict[str, Any] = {}
        self.size: dict[str, int] = {}

    def own_size(self, pipe: Any) -> dict[str, int]:
        """Height and width in pixels: as in the settings, else the pipeline's own."""
        own = denoiser(pipe).config.sample_size * pipe.vae_scale_factor
        return {side: self.settings[side] or own for side in ("height", "width")}

    def start(self) -> dict[str, Any]:
        """Load, prepare and warm up a pipeline for each backend."""
        once = {}
        for name, prepare in self.backends.items():
            pipe = self.pipes[name] = self.load()
            self.size = self.size or self.own_size(pipe)
            start = self.clock()
            prepare(pipe)
            self.draw(pipe)
            once[f"{name} · first picture"] = 1e3 * (self.clock() - start)
            for _ in range(2):  # the decoder is recorded at the second
                self.draw(pipe)
        groups = [[f"{name} · {part}" for part in ("step", "decode")] for name in self.pipes]
        return {"groups": groups, "once": once}

    def run(self, group: int) -> dict[str, float]:
        name, pipe = list(self.pipes.items())[group]
        denoise, decode = self.draw(pipe)
        return {f"{name} · step": denoise / self.settings["steps"], f"{name} · decode": decode}

    def draw(self, pipe: Any) -> tuple[float, float]:
        """The milliseconds up to the latents, and those of decoding them."""
        start = self.clock()
        latents = pipe(PROMPT, output_type="latent", **self.call()).images
        between = self.clock()
        config = pipe.vae.config
        with self.torch.no_grad():
            latents = latents.to(pipe.vae.dtype) / config.scaling_factor
            pipe.vae.decode(latents + (getattr(config, "shift_factor", None) or 0.0))
        return 1e3 * (between - start), 1e3 * (self.clock() - between)

    def clock(self) -> float:
        if self.settings["device"] != "cpu":
            self.torch.cuda.synchronize(self.settings["device"])
        return time.perf_counter()

    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline's call, the same for both states."""
        return {
            **self.size,
            "num_inference_steps": self.settings["steps"],
            "guidance_scale": GUIDANCE_SCALE,
            "generator": self.torch.Generator("cpu").manual_seed(0),
        }

    def check(self) -> dict[str, str]:
        """The backends with a wrong picture, by the state's own receipt against float64."""
        if set(self.pipes) == {"eager"}:  # eager is the reference, and needs no fastdiff
            return {}
        from fastdiff.bench.receipt import check, find_truth, run_step
        from fastdiff.bench.timing import Request, draw

        height, width = self.size.values()
        pipe = self.load()
        factor, channels = pipe.vae_scale_factor, denoiser(pipe).config.in_channels
        shape = (1, channels, height // factor, width // factor)
        latents = self.torch.randn(shape, generator=self.torch.Generator().manual_seed(0))
        request = Request(PROMPT, CHECKED_STEPS, height, width, latents, seed=0)
        truth = find_truth(pipe, request)
        wrong = {}
        for name, pipe in self.pipes.items():
            step = run_step(denoiser(pipe), truth.step)
            receipt = check(draw(pipe, request).image, step, truth)
            if not receipt.passed:
                wrong[name] = f"its picture is {receipt.psnr_db:.0f} dB from eager's"
        return wrong

    def count(self) -> dict[str, tuple[float, str]]:
        """Counts of fastdiff's pictures that do not vary, by the state's own counters."""
        if "fastdiff" not in self.pipes:
            return {}
        try:
            from fastdiff.bench.gates import gates
        except ModuleNotFoundError as error:
            if error.name == "fastdiff.bench.gates":  # a state older than these
                return {}
            raise
        found = gates(self.load, self.settings["device"], **self.size)
        return {f"fastdiff · {name}": number for name, number in found.items()}

    def load(self) -> Any:
        settings = self.settings
        dtype = getattr(self.torch, settings["dtype"])
        if settings["preset"]:
            from fastdiff.bench.presets import build

            pipe = build(settings["preset"], settings["scale"], dtype, settings["device"])
        elif settings["folder"]:
            pipe = self.reader.from_pretrained(
                settings["folder"], dtype=dtype, local_files_only=True, use_safetensors=True
            ).to(settings["device"])
        else:
            import fastdiff

            pipe = fastdiff.load_demo(dtype, settings["device"])
        # without fastdiff.recipes, as above
        upcast = "XL" in type(pipe).__name__ and pipe.vae.config.force_upcast
        if upcast and dtype == self.torch.float16:  # as diffusers does when it decodes
            pipe.vae.to(self.torch.float32)
        pipe.set_progress_bar_config(disable=True)
        return pipe


class Kernels:
    """Each kernel's cases from real models, with the implementation that the device uses."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch

        from fastdiff.bench import kernels

        self.kernels = kernels
        self.dtype = getattr(torch, settings["dtype"])
        self.device = torch.device(settings["device"])
        self.cases = {
            name: (kernel, case)
            for kernel, case in kernels.cases(settings["device"])
            # the name includes the sizes, so changed sizes make another row
            if settings["filter"] in (name := f"{kernel.spec.name} · {case!r}")
        }
        self.runners: list[Any] = []

    def start(self) -> dict[str, Any]:
        self.runners = [
            self.kernels.runner(*self.arguments(kernel, case))
            for kernel, case in self.cases.values()
        ]
        return {"groups": [[name] for name in self.cases], "once": {}}

    def run(self, group: int) -> dict[str, float]:
        return {list(self.cases)[group]: self.runners[group]()}

    def check(self) -> dict[str, str]:
        """The cases that exceed the error budget."""
        wrong = {}
        for name, (kernel, case) in self.cases.items():
            try:
                self.kernels.check(*self.arguments(kernel, case))
            except self.kernels.OutOfBudget as error:
                wrong[name] = str(error)
        return wrong

    def count(self) -> dict[str, tuple[float, str]]:
        return {}

    def arguments(self, kernel: Any, case: Any) -> tuple[Any, ...]:
        return kernel, case, self.dtype, self.device, self.kernels.chosen(kernel, self.device)


SUITES: dict[str, Any] = {"pipelines": Pipelines, "kernels": Kernels}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    settings = _read()
    import torch

    if settings["device"] == "cpu":
        torch.set_num_threads(settings["threads"])
    suite = SUITES[settings["suite"]](settings)
    answer({"versions": _versions(settings["packages"])})
    gc.collect()
    gc.freeze()
    while _read():  # "start"
        child = os.fork()
        if child == 0:
            try:
                _serve(suite, answer)
            except BaseException as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                answer({"error": f"{type(error).__name__}: {reason}"})
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            answer({"error": f"its process was ended by signal {status & 127}"})
            return


def _serve(suite: Any, answer: Any) -> None:
    """Answer requests in a new process until one says to stop."""
    answer(suite.start())
    gc.collect()
    gc.freeze()
    gc.disable()
    while True:
        asked = _read()
        match asked.get("do"):
            case "run":
                times = suite.run(asked["group"])
                gc.collect()  # not while timing
                answer({"ms": times})
            case "check":
                answer({"wrong": suite.check()})
            case "count":
                answer({"counts": suite.count()})
            case _:
                answer({})
                return


def _read() -> dict[str, Any]:
    """The next line, {} at the end; byte by byte, since parent and child read the same pipe."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return {}
        line += byte
    read: dict[str, Any] = json.loads(line)
    return read


def _backend(name: str) -> Any:
    """The function that makes a pipeline run on a backend; eager needs no fastdiff."""
    if name == "eager":
        return lambda pipe: None
    if name == "fastdiff":
        import fastdiff
        import fastdiff.compiler

        return fastdiff.compile
    from fastdiff.bench.backends import BACKENDS

    return BACKENDS[name]


def _versions(packages: list[str]) -> dict[str, str | None]:
    from importlib import metadata

    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    with suppress(ModuleNotFoundError):  # a state without fastdiff runs eagerly
        found["fastdiff._C"] = "built" if find_spec("fastdiff._C") else None
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


if __name__ == "__main__":
    main()
