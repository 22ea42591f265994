"""export: ONNX files and their check against torch, TensorRT engines, a model repository."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.cli.engines import EngineOptions, write_engines
from fastdiff.cli.options import (
    Config,
    Json,
    Lora,
    Preset,
    Scale,
    Scheduler,
    Variant,
    app,
    source_of,
)
from fastdiff.cli.repository import write_repository
from fastdiff.errors import UserError


@app.command()
def export(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="The new folder to make.")],
    pipeline: Annotated[
        str | None,
        typer.Argument(
            metavar="PIPELINE",
            help="A folder that save_pretrained wrote, a hub id (owner/name), or a .safetensors"
            " file with a whole pipeline; with --triton-repo also a folder made by --onnx or --trt."
            " Default: the demo that comes with fastdiff.",
            show_default=False,
        ),
    ] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Make ONNX files, in Optimum's layout.")
    ] = False,
    trt: Annotated[bool, typer.Option("--trt", help="Make TensorRT engines.")] = False,
    triton_repo: Annotated[
        bool,
        typer.Option("--triton-repo", help="Make a model repository of Triton Inference Server."),
    ] = False,
    preset: Preset = None,
    scale: Scale = 1.0,
    scheduler: Scheduler = None,
    lora: Lora = None,
    variant: Variant = None,
    config: Config = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="fp32, bf16 or fp16. Default: fp32, with --trt fp16."),
    ] = None,
    opset: Annotated[
        str,
        typer.Option(help="ONNX opset, 18 to 23; auto: 20 for ONNX Runtime, 22 for TensorRT."),
    ] = "auto",
    verify: Annotated[
        bool,
        typer.Option("--verify", help="--onnx: run each file and compare it with torch's result."),
    ] = False,
    ort_fused: Annotated[
        bool,
        typer.Option(
            "--ort-fused", help="--onnx: use the GroupNorm that only ONNX Runtime on CUDA has."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List files, shapes and opset; make nothing.")
    ] = False,
    flavor: Annotated[
        str | None,
        typer.Option(help="--trt: the library that builds: tensorrt, rtx or auto (the default)."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="--trt: GPU architectures, such as sm_89,sm_120. Default: the GPU here."),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            help="--trt: minimum:optimum:maximum, each pictures x height x width, such as"
            " 1x256x256:1x512x512:2x768x768."
        ),
    ] = None,
    static: Annotated[
        str | None,
        typer.Option(help="--trt: one shape only, such as 1x512x512, drawn with guidance."),
    ] = None,
    compatible: Annotated[
        str | None,
        typer.Option(
            help="--trt: where else engines must run: hardware (other GPUs), version (other"
            " versions of TensorRT), or hardware,version."
        ),
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(help="--trt: a file that keeps TensorRT's timings for the next build."),
    ] = None,
    json_file: Json = None,
) -> None:
    """Write the networks as ONNX files, TensorRT engines, or a server's model repository.

    Exits with 1 if an engine, or with --verify a file, computes something other than torch.
    """
    kinds = {"--onnx": onnx, "--trt": trt, "--triton-repo": triton_repo}
    if sum(kinds.values()) != 1:
        raise UserError("give one of --onnx, --trt and --triton-repo to say what to make")
    only_trt = EngineOptions(flavor, target, shapes, static, compatible, timing_cache)
    if lost := [one for one in only_trt.given() if not trt and (onnx or one != "--target")]:
        raise UserError(f"{lost[0]} needs --trt")
    if ort_fused and not onnx:
        raise UserError("--ort-fused needs --onnx")
    if verify and dry_run:
        raise UserError("got --verify, which runs files, and --dry-run, which makes none; give one")
    if verify and triton_repo:
        raise UserError("--verify needs --onnx; verify that folder, then give it to --triton-repo")
    if verify and trt:
        raise UserError("--verify needs --onnx; it runs no engines")
    from fastdiff.bench.pipelines import check_dtype
    from fastdiff.bench.progress import status
    from fastdiff.bench.source import fused as fused_source
    from fastdiff.export import fused
    from fastdiff.export import onnx as exporter
    from fastdiff.export.folder import check_new
    from fastdiff.export.parts import left_out, parts
    from fastdiff.written import afterwards, check_writable

    torch_dtype = check_dtype(dtype or ("fp16" if trt else None), "cpu")
    if verify and dtype == "bf16":
        raise UserError(
            "--verify needs fp32 or fp16: ONNX Runtime on a CPU has no bf16 convolution"
        )
    usual = exporter.TRT_OPSET if trt else exporter.ORT_OPSET
    number = exporter.check_opset(opset, usual, torch_dtype)
    if ort_fused:
        fused.check(number, torch_dtype)
    exporter.check_packages(verify)
    if json_file:
        check_writable(json_file, "--json")
    source = source_of(context)

    def load() -> tuple[Any, Any]:
        pipe = fused_source(source, torch_dtype)
        # Triton's TensorRT backend takes no scalar; Optimum has one
        return pipe, parts(pipe, torch_dtype, timestep=(1,) if trt else ())

    if triton_repo:
        given = {"--opset": opset != "auto"} | {
            f"--{name}": context.params[name]
            for name in ("preset", "dtype", "scheduler", "lora", "variant", "config")
        }
        asked = [option for option, value in given.items() if value]
        folder = Path(pipeline) if pipeline else None
        return write_repository(folder, out, asked, target, load, number, dry_run, json_file)
    if trt:
        return write_engines(out, only_trt, load, number, dry_run, json_file)
    check_new(out)
    with status() as log:
        log("loading")
        pipe, networks = load()
        written = () if dry_run else exporter.export(pipe, networks, out, number, log, ort_fused)
        document = exporter.document(networks, number, written)
        document |= {"out": str(out), "dry_run": dry_run, "left_out": left_out(pipe)}
        parity = _verify(pipe, networks, out, ort_fused, log) if verify else None
    whole = document | ({"parity": parity[0]} if parity else {})
    with afterwards(json_file, lambda: json.dumps(whole, indent=1) + "\n"):
        _show(document)
        if parity:
            print(parity[1])
    if parity and not parity[0]["passed"]:
        raise typer.Exit(1)


def _verify(
    pipe: Any, networks: Any, out: Path, ort_fused: bool, log: Callable[[str], object]
) -> tuple[dict[str, Any], str]:
    """Write the parity report into `out` as JSON and Markdown, and return both."""
    from fastdiff.export import fused, parity
    from fastdiff.written import told, write_file

    runnable = fused.spelled_out(out, networks) if ort_fused else nullcontext(out)
    with runnable as place, told(place):  # the bisection writes its files there
        result = parity.verify(pipe, networks, place, log)
    document, text = parity.to_dict(result), parity.to_markdown(result)
    if ort_fused:
        document["spelled_out"] = fused.OPERATOR
        text += (
            f"\n{fused.OPERATOR} was computed with standard operators: it does not run on CPUs.\n"
        )
    as_json = json.dumps(document, indent=1, allow_nan=False) + "\n"
    with told(out):
        write_file(out / "parity.json", lambda path: path.write_text(as_json, encoding="utf-8"))
        write_file(out / "parity.md", lambda path: path.write_text(text, encoding="utf-8"))
    return document, text


def _show(document: dict[str, Any]) -> None:
    """Print a line for each file, one for each of its tensors, and what was left out."""
    would = "would write" if document["dry_run"] else "wrote"
    print(f"{would} {document['out']}, opset {document['opset']}")
    for part in document["parts"]:
        size = f", {part['bytes'] / 1e6:.1f} MB, {part['seconds']:g} s" if "bytes" in part else ""
        print(f"{part['file']}: {part['dtype']}{size}")
        for operator, nodes in part.get("contrib_ops", {}).items():
            print(f"  {len(nodes)} nodes of {operator}, for ONNX Runtime on CUDA only")
        for direction in ("inputs", "outputs"):
            for name, (dtype, *shape) in part[direction].items():
                print(f"  {direction[:-1]} {name}: {dtype} [{', '.join(map(str, shape))}]")
    for name in document["left_out"]:
        print(f"left out: {name}, which has no ONNX file")
