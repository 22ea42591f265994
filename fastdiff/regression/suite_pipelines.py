"""What a comparison times of a pipeline, in the interpreter of either state; see `worker`."""

import inspect
import time
from dataclasses import replace
from typing import Any

GUIDANCE_SCALE, PROMPT = 4.0, "red heart"
CHECKED_STEPS = 2
"""Steps of the picture that is compared with float64; its last step is checked separately, too."""


def denoiser(pipe: Any) -> Any:
    """The network that a pipeline's loop repeats."""
    # without fastdiff.recipes: a state may be older than that, or have no fastdiff
    names = ("transformer", "unet", "prior", "decoder")
    return next(net for name in names if (net := getattr(pipe, name, None)) is not None)


def draws_as_sd(pipe: Any) -> bool:
    """Whether a pipeline makes latents of a prompt, of a size that its network's config tells, and
    its VAE decodes them at once: as Stable Diffusion does."""
    takes = inspect.signature(pipe.__call__).parameters
    # PixArt would replace a small size by one that it was trained on
    whole = {"prompt", "height"} <= takes.keys() and "use_resolution_binning" not in takes
    parts = all(getattr(pipe, name, None) is not None for name in ("text_encoder", "vae"))
    return whole and parts and "sample_size" in denoiser(pipe).config


class Suite:
    """Pictures by each backend: steps up to the latents, decoding, and the preparation."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch
        from diffusers import DiffusionPipeline

        self.settings, self.torch, self.reader = settings, torch, DiffusionPipeline
        self.backends = {name: _backend(name) for name in settings["backends"]}
        self.pipes: dict[str, Any] = {}
        self.size: dict[str, int] = {}
        """Height and width in pixels: as in the settings, else the pipeline's own."""
        self.request: Any = None
        """What the state's own bench draws of a pipeline that does not draw as Stable Diffusion."""
        self.drawn: Any = None
        """(pipeline, request) -> the state's own drawing, with its times."""

    def settle(self, pipe: Any) -> None:
        """Set the size, and the request if there is to be one."""
        sides = ("height", "width")
        if draws_as_sd(pipe):
            own = denoiser(pipe).config.sample_size * pipe.vae_scale_factor
            self.size = {side: self.settings[side] or own for side in sides}
            return
        try:
            from fastdiff.bench.calls import latents_of
            from fastdiff.bench.pipelines import check_size
            from fastdiff.bench.timing import Request, draw
        except ImportError as error:
            kind = type(pipe).__name__
            raise ValueError(
                f"a {kind} is drawn by the state's own fastdiff.bench, which is missing or too old"
            ) from error
        size = check_size(pipe, *(self.settings[side] for side in sides))
        self.size = dict(zip(sides, size, strict=True))
        latents = latents_of(pipe, *size, seed=0)
        self.request = Request(PROMPT, self.settings["steps"], *size, latents, seed=0)
        self.drawn = draw

    def start(self) -> dict[str, Any]:
        """Load, prepare and warm up a pipeline for each backend."""
        once: dict[str, float] = {}
        groups: list[list[str]] = []
        for name, prepare in self.backends.items():
            pipe = self.pipes[name] = self.load()
            if not self.size:
                self.settle(pipe)
            start = self.clock()
            prepare(pipe)
            self.draw(pipe)
            once[f"{name} · first picture"] = 1e3 * (self.clock() - start)
            self.draw(pipe)  # the decoder is recorded at the second
            groups.append(list(self.run(len(groups))))
        return {"groups": groups, "once": once}

    def run(self, group: int) -> dict[str, float]:
        name, pipe = list(self.pipes.items())[group]
        denoise, decode = self.draw(pipe)
        times = {"step": denoise / self.settings["steps"], "decode": decode}
        return {f"{name} · {part}": ms for part, ms in times.items() if ms}

    def draw(self, pipe: Any) -> tuple[float, float]:
        """The milliseconds without decoding, and those of decoding: 0 if nothing is decoded."""
        if self.request is not None:
            made = self.drawn(pipe, self.request)
            return made.step_ms * self.settings["steps"], made.decode_ms
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

        pipe, request = self.load(), self.request
        if request is None:
            height, width = self.size.values()
            factor, channels = pipe.vae_scale_factor, denoiser(pipe).config.in_channels
            shape = (1, channels, height // factor, width // factor)
            latents = self.torch.randn(shape, generator=self.torch.Generator().manual_seed(0))
            request = Request(PROMPT, CHECKED_STEPS, height, width, latents, seed=0)
        request = replace(request, steps=CHECKED_STEPS)
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
