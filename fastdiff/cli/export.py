"""export: the networks as ONNX, the proof that they draw the same, engines, a server's folder."""

import json as json_module
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.cli.engines import EngineOptions, write_engines
from fastdiff.cli.options import Dtype, Preset, Scale, app, choose_pipe
from fastdiff.cli.repository import write_repository
from fastdiff.errors import UserError


@app.command()
def export(
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="A diffusers pipeline, the demo if absent; or what --onnx or --trt wrote."
        ),
    ] = None,
    onnx: Annotated[Path | None, typer.Option(help="The new folder, in Optimum's layout.")] = None,
    trt: Annotated[Path | None, typer.Option(help="The new folder of TensorRT engines.")] = None,
    triton_repo: Annotated[
        Path | None, typer.Option(help="The new model repository of Triton Inference Server.")
    ] = None,
    preset: Preset = None,
    scale: Scale = 1.0,
    dtype: Dtype = None,
    opset: Annotated[
        str, typer.Option(help="auto (20 for ONNX Runtime, 22 for TensorRT) or 18 to 23.")
    ] = "auto",
    verify: Annotated[
        bool, typer.Option("--verify", help="Run each file against torch; report beside it.")
    ] = False,
    ort_fused: Annotated[
        bool,
        typer.Option(
            "--ort-fused", help="--onnx: GroupNorm for ONNX Runtime's CUDA provider only."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List files, shapes and opset; write nothing.")
    ] = False,
    flavor: Annotated[
        str | None, typer.Option(help="--trt: auto, tensorrt or rtx, the library that builds.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="--trt: sm_89,sm_120,…; the GPU that is there if absent.")
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(help="--trt: MIN:OPT:MAX, each pictures x height x width, as 1x512x512."),
    ] = None,
    static: Annotated[
        str | None, typer.Option(help="--trt: one shape alone, as 1x512x512; with guidance.")
    ] = None,
    compatible: Annotated[
        str | None, typer.Option(help="--trt: hardware, version, or both with a comma.")
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="--trt: a file of tactics timed before; made if absent.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="As one JSON object, on stdout.")] = False,
) -> None:
    """The networks as ONNX files, proven against torch, or as TensorRT engines."""
    places = {"--onnx": onnx, "--trt": trt, "--triton-repo": triton_repo}
    if sum(place is not None for place in places.values()) != 1:
        raise UserError("give one of --onnx, --trt and --triton-repo, the new folder to write")
    only_trt = EngineOptions(flavor, target, shapes, static, compatible, timing_cache)
    if lost := [one for one in only_trt.given() if not trt and (onnx or one != "--target")]:
        raise UserError(f"{lost[0]} goes with --trt")
    if ort_fused and onnx is None:
        raise UserError("--ort-fused goes with --onnx")
    if verify and dry_run:
        raise UserError("--dry-run writes nothing that --verify could run; give one of them")
    if verify and triton_repo:
        raise UserError("--verify goes with --onnx, whose folder --triton-repo then takes")
    if verify and trt:
        raise UserError("--verify goes with --onnx; it runs no engines")
    from fastdiff.bench.pipelines import check_dtype
    from fastdiff.bench.progress import status
    from fastdiff.export import fused
    from fastdiff.export import onnx as exporter
    from fastdiff.export.folder import check_new
    from fastdiff.export.parts import left_out, parts

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

    def load() -> tuple[Any, Any]:
        pipe, _ = choose_pipe(folder, preset, scale, torch_dtype, "cpu")
        # Triton's TensorRT backend takes no scalar; Optimum has one
        return pipe, parts(pipe, torch_dtype, timestep=(1,) if trt else ())

    if triton_repo is not None:
        given = {"--preset": preset, "--dtype": dtype, "--opset": opset != "auto"}
        asked = [option for option, value in given.items() if value]
        return write_repository(folder, triton_repo, asked, target, load, number, dry_run, json)
    if trt is not None:
        return write_engines(trt, only_trt, load, number, dry_run, json)
    assert onnx is not None
    check_new(onnx)
    with status() as log:
        log("loading")
        pipe, networks = load()
        written = () if dry_run else exporter.export(pipe, networks, onnx, number, log, ort_fused)
        document = exporter.document(networks, number, written)
        document |= {"out": str(onnx), "dry_run": dry_run, "left_out": left_out(pipe)}
        parity = _verify(pipe, networks, onnx, ort_fused, log) if verify else None
    if json:
        print(json_module.dumps(document | ({"parity": parity[0]} if parity else {}), indent=1))
    else:
        _show(document)
        if parity:
            print(parity[1])
    if parity and not parity[0]["passed"]:
        raise typer.Exit(1)


def _verify(
    pipe: Any, networks: Any, out: Path, ort_fused: bool, log: Callable[[str], object]
) -> tuple[dict[str, Any], str]:
    """The parity report as JSON and as Markdown, both written into `out`."""
    from fastdiff.export import fused, parity
    from fastdiff.written import told, write_file

    runnable = fused.spelled_out(out, networks) if ort_fused else nullcontext(out)
    with runnable as place, told(place):  # what the bisection runs lies there a while
        result = parity.verify(pipe, networks, place, log)
    document, text = parity.to_dict(result), parity.to_markdown(result)
    if ort_fused:
        document["spelled_out"] = fused.OPERATOR
        text += f"\n{fused.OPERATOR} was computed in standard operators: no CPU has it.\n"
    as_json = json_module.dumps(document, indent=1, allow_nan=False) + "\n"
    with told(out):
        write_file(out / "parity.json", lambda path: path.write_text(as_json, encoding="utf-8"))
        write_file(out / "parity.md", lambda path: path.write_text(text, encoding="utf-8"))
    return document, text


def _show(document: dict[str, Any]) -> None:
    """A line for each file, one for each of its tensors, and what was left out."""
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
