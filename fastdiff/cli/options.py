"""What commands share: the application, their options, and the pipeline that these name.

Every command spells these the same way: the pipeline is the positional argument, `--out` names what
is made, `--json FILE` is where the machine-readable document goes.
"""

import math
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastdiff.errors import UserError

if TYPE_CHECKING:
    from fastdiff.bench.source import Source

app = typer.Typer(
    help="Makes diffusers pipelines fast without changing what they draw.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Pipeline = Annotated[
    str | None,
    typer.Argument(
        metavar="PIPELINE",
        help="A folder that save_pretrained wrote, a hub id (owner/name), or a .safetensors file"
        " that holds a whole pipeline. Default: the demo that comes with fastdiff.",
        show_default=False,
    ),
]
Saved = Annotated[
    str | None,
    typer.Argument(
        metavar="PIPELINE",
        help="A folder that save_pretrained wrote, or a hub id (owner/name). Default: the demo that"
        " comes with fastdiff.",
        show_default=False,
    ),
]
Variant = Annotated[
    str | None,
    typer.Option(
        help="Which files of weights to read where a folder or hub id has several, as fp16."
        " Default: those without a variant, or the only ones there are."
    ),
]
Config = Annotated[
    str | None,
    typer.Option(
        help="For a .safetensors file: a folder or hub id of a pipeline with the same networks,"
        " whose configs and tokenizers are used. Default: the hub id that diffusers finds for it."
    ),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LORA[=WEIGHT]",
        help="LoRA adapter: a .safetensors file, a folder or a hub id, and how strongly it counts,"
        " 1 if not given. Repeat it for several.",
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="A scheduler class of diffusers, as EulerDiscreteScheduler. Default: the pipeline's."
    ),
]
Steps = Annotated[int, typer.Option(help="Number of denoising steps.")]
Seed = Annotated[
    int,
    typer.Option(help="The same seed draws the same picture again.", min=0, max=2**63 - 1),
]
Side = Annotated[
    int | None, typer.Option(help="Of the picture, in pixels. Default: the pipeline's own size.")
]
Dtype = Annotated[
    str | None, typer.Option(help="fp32, bf16 or fp16. Default: fp32 on a CPU, fp16 on a GPU.")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N. Default: cuda where there is a GPU.")
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Draw by Ray. local starts a cluster on this machine, auto joins the one that runs"
        " here; or the address of another one.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        help="How many draw at the same time: threads that divide the cores of a CPU, 1 by default;"
        " with --ray processes, by default as many as the GPUs hold, or one for each CPU.",
        min=1,
    ),
]
GpusPerWorker = Annotated[
    float | None,
    typer.Option(
        help="With --ray: GPUs of a worker; 0.5 lets two share one. Default: 1, or 0 where there"
        " are none.",
        min=0.0,
    ),
]
PRESETS = (
    "sd15, sd21, sdxl, tiny, ldm, x4, ddpm-cifar, ddpm-256, consistency-64, dit-256, dit-512,"
    " pixart-sigma, flux, flux2, auraflow, z-image, qwen-image, prior, unclip, kandinsky22, if,"
    " sd3, sd35-medium, sd35-large, or one of the last three with -t5"
)
Preset = Annotated[
    str | None,
    typer.Option(
        help=f"Instead of a pipeline: a known network with random weights: {PRESETS} for T5 too."
    ),
]
Scale = Annotated[
    float,
    typer.Option(help="With --preset: multiplies its widths and its picture's sides; at most 1."),
]
Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the machine-readable document here."),
]


def source_of(context: typer.Context) -> "Source":
    """What the command line says of the pipeline to open."""
    from fastdiff.bench.source import Source

    given = context.params
    named = {one.name: given[one.name] for one in fields(Source) if one.name in given}
    return Source(**named | {"lora": tuple(given.get("lora") or ())})


def at_least(option: str, value: int, least: int) -> None:
    """UserError unless the option's value is at least `least`."""
    if value < least:
        raise UserError(f"{option} is {value}; give at least {least}")


def finite_guidance(scale: float | None) -> None:
    """UserError unless --guidance-scale is a number, or absent."""
    if scale is not None and not math.isfinite(scale):
        raise UserError(f"--guidance-scale is {scale}; give a number, such as 4")


def was_given(context: typer.Context, parameter: str) -> bool:
    """Whether a parameter stood on the command line."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name != "DEFAULT"
