"""Times a VAE, the first picture of a new size, and a switch between LoRA adapters."""

from collections.abc import Callable
from typing import Any

import torch

from fastdiff import compile
from fastdiff.bench.presets import build
from fastdiff.bench.timing import clock
from fastdiff.demo import load_demo

Row = dict[str, Any]
REPEATS = 11
VAE_SIDE = 128
"""The latents' side for decoding: a picture of 1024 x 1024, as in SDXL and SD3."""


def _pipeline(device: torch.device, dry_run: bool) -> Any:
    pipe = load_demo() if dry_run else build("sd15", 1.0, torch.float16, str(device))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _timed(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds until the device has finished."""
    start = clock(device)
    run()
    return 1e3 * (clock(device) - start)


def time_vae(device: torch.device, dry_run: bool, add: Callable[[Row], object]) -> None:
    """Decode one picture of 1024 x 1024 (in a dry run the demo's): eager, then compiled."""
    pipe = _pipeline(device, dry_run)
    side = pipe.unet.config.sample_size if dry_run else VAE_SIDE
    channels = pipe.vae.config.latent_channels
    shape, dtype = (1, channels, side, side), next(pipe.vae.parameters()).dtype
    latents = torch.randn(shape, device=device, dtype=dtype)
    times: dict[str, list[float]] = {}
    with torch.no_grad():
        for name in ("eager", "ours"):
            if name == "ours":
                compile(pipe)
            for _ in range(3):  # libraries choose, kernels compile, graphs are recorded
                pipe.vae.decode(latents)
            decode = pipe.vae.decode
            times[name] = [_timed(lambda: decode(latents), device) for _ in range(REPEATS)]  # noqa: B023
    sizes = dict(zip("BCYX", shape, strict=True))
    case = f"{pipe.vae_scale_factor * side} px"
    add({"kernel": "vae", "case": case, "sizes": sizes, "samples_ms": times})


def time_changes(device: torch.device, dry_run: bool, add: Callable[[Row], object]) -> None:
    """The milliseconds of each change, and of drawing again without a change."""
    pipe = _pipeline(device, dry_run)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor

    def draw(width: int) -> None:
        pipe("red heart", height=side, width=width, num_inference_steps=4)

    adapters = _add_adapters(pipe)
    if adapters is not None:
        add({"change": "lora", "unavailable": adapters})
    compile(pipe)
    for _ in range(2):
        draw(side)
    for width in (side + 64, side + 128, side + 192):
        first = _timed(lambda width=width: draw(width), device)
        again = [_timed(lambda width=width: draw(width), device) for _ in range(5)]
        add({"change": "new width", "first_ms": first, "again_ms": again})
    slot = pipe.unet._compiled_call_impl
    with torch.no_grad():
        for name in () if adapters else ("one", "two", "one", "two"):
            pipe.unet.set_adapters(name)
            add({"change": "lora", "switch_ms": _timed(slot.offer, device)})


def _add_adapters(pipe: Any) -> str | None:
    """Add two LoRA adapters to the U-Net, "one" and "two"; returns why not, if that fails."""
    try:
        from peft import LoraConfig
    except ImportError as missing:
        return str(missing)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    for name, rank in (("one", 4), ("two", 64)):
        config = LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)
        pipe.unet.add_adapter(config, name)
    return None
