"""What commands share: the application, their options, and the pipeline that these options name.

Every command spells them the same way: the pipeline is the positional argument, `--out` names what
is made, and `--json FILE` is where the JSON document goes.
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
        " with a whole pipeline. Default: the demo that comes with fastdiff.",
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
        help="Which weight files to read if a folder or hub id has several variants, such as fp16."
        " Default: the files without a variant, or the only variant."
    ),
]
Config = Annotated[
    str | None,
    typer.Option(
        help="For a .safetensors file: the folder or hub id of a pipeline with the same networks,"
        " whose configs and tokenizers are used. Default: the hub id that diffusers finds for it."
    ),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LORA[=WEIGHT]",
        help="A LoRA adapter: a .safetensors file, a folder or a hub id, with its weight (1 if not"
        " given). Repeat it for several.",
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="A scheduler class of diffusers, such as EulerDiscreteScheduler. Default: the"
        " pipeline's own."
    ),
]
Steps = Annotated[int, typer.Option(help="Number of denoising steps.")]
Seed = Annotated[
    int,
    typer.Option(help="The same seed draws the same picture again.", min=0, max=2**63 - 1),
]
Side = Annotated[
    int | None, typer.Option(help="The picture's size in pixels. Default: the pipeline's own size.")
]
Dtype = Annotated[
    str | None, typer.Option(help="fp32, bf16 or fp16. Default: fp32 on a CPU, fp16 on a GPU.")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N. Default: cuda if there is a GPU.")
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Draw with Ray: local starts a cluster on this machine, auto joins the cluster that"
        " runs here, and an address joins another cluster.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        help="Number of workers that draw at the same time: threads that share the cores of a CPU,"
        " by default 1; with --ray processes, by default as many as fit on the GPUs, or one for"
        " each CPU.",
        min=1,
    ),
]
GpusPerWorker = Annotated[
    float | None,
    typer.Option(
        help="With --ray: GPUs per worker; 0.5 lets two workers share a GPU. Default: 1, or 0 if"
        " there are none.",
        min=0.0,
    ),
]
PRESETS = (
    "sd15, sd21, sdxl, tiny, ldm, x4, ddpm-cifar, ddpm-256, consistency-64, dit-256, dit-512,"
    " pixart-alpha, pixart-sigma, flux, flux2, auraflow, z-image, qwen-image, prior, unclip,"
    " kandinsky22, if, sd3, sd35-medium, sd35-large, or one of the last three with -t5 to add"
    " T5"
)
Preset = Annotated[
    str | None,
    typer.Option(help=f"Instead of a pipeline, a known network with random weights: {PRESETS}."),
]
Scale = Annotated[
    float,
    typer.Option(
        help="With --preset: multiplies the network's widths and the picture's sides; at most 1."
    ),
]
Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the results as JSON to this file."),
]


def source_of(context: typer.Context) -> "Source":
    """The pipeline that the command line names."""
    from fastdiff.bench.source import Source

    given = context.params
    named = {one.name: given[one.name] for one in fields(Source) if one.name in given}
    return Source(**named | {"lora": tuple(given.get("lora") or ())})


def at_least(option: str, value: int, least: int) -> None:
    """UserError unless the option's value is at least `least`."""
    if value < least:
        raise UserError(f"{option} is {value}; give at least {least}")


def finite_guidance(scale: float | None) -> None:
    """UserError unless --guidance-scale is absent or finite."""
    if scale is not None and not math.isfinite(scale):
        raise UserError(f"--guidance-scale is {scale}; give a number, such as 4")


def was_given(context: typer.Context, parameter: str) -> bool:
    """Whether a parameter was given on the command line."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name != "DEFAULT"
