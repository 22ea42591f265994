"""What commands share: the application, their options, and the pipeline these name."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.errors import UserError

app = typer.Typer(
    help="Makes diffusers pipelines fast without changing what they draw.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DEMO = Path("demo")
Folder = Annotated[Path | None, typer.Argument(help="A diffusers pipeline; the demo if absent.")]
Steps = Annotated[int, typer.Option(help="Denoising steps.")]
Seed = Annotated[int, typer.Option(help="Same seed, same picture.", min=0, max=2**63 - 1)]
Side = Annotated[int | None, typer.Option(help="Pixels; the pipeline's own if absent.")]
Dtype = Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; fp32 on a CPU, else fp16.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one.")]
PRESETS = "sd15, sd21, sdxl, tiny, sd3, sd35-medium, sd35-large; -t5 after these with T5."
Preset = Annotated[str | None, typer.Option(help=PRESETS)]
Scale = Annotated[float, typer.Option(help="Preset's widths and picture, 0 to 1.")]


def choose_pipe(
    folder: Path | None, preset: str | None, scale: float, dtype: Any, device: str
) -> tuple[Any, str]:
    """The pipeline of a folder (on the CPU) or a preset (on `device`), else the demo; its name."""
    one_of(folder, preset)
    if scale != 1.0 and not preset:
        raise UserError("--scale goes with --preset; a folder's widths are what they are")
    if folder == DEMO and not folder.exists():
        folder = None
    if not preset:
        return load_pipe(folder, dtype, "cpu"), folder.name if folder else "demo"
    from fastdiff.bench.presets import build

    return build(preset, scale, dtype, device), f"{preset} scale {scale:g}"


def one_of(folder: object, preset: str | None) -> None:
    """UserError where a folder and a preset are given."""
    if folder and preset:
        raise UserError(f"got the folder {folder} and --preset {preset}; give one of them")


def load_pipe(folder: Path | None, dtype: Any, device: str) -> Any:
    """The pipeline in `folder`, or the demo."""
    if folder:
        from fastdiff.bench.pipelines import load

        return load(folder, dtype, device)
    from fastdiff.demo import load_demo

    return load_demo(dtype, device)


def at_least(option: str, value: int, least: int) -> None:
    """UserError unless the option's value is at least `least`."""
    if value < least:
        raise UserError(f"{option} is {value}; give at least {least}")


def was_given(context: typer.Context, parameter: str) -> bool:
    """Whether a parameter stood on the command line."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name != "DEFAULT"
