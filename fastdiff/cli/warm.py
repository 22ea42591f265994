"""warm: compile a pipeline's kernels here for GPUs that are elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from fastdiff.cli.facts import known_archs
from fastdiff.cli.options import Preset, Saved, app


@app.command()
def warm(
    out: Annotated[Path, typer.Option(help="The new folder for the kernels.")],
    arch: Annotated[
        list[int],
        typer.Option(help="A GPU's architecture: 80, 86, 89, 90, 100 or 120. Repeat it for more."),
    ],
    pipeline: Saved = None,
    preset: Preset = None,
    dtype: Annotated[str, typer.Option(help="fp16, bf16 or fp32.")] = "fp16",
) -> None:
    """Compile a pipeline's GPU kernels on a machine without that GPU.

    Copy the folder to a machine with that GPU: there, fastdiff.Options(warm=OUT) loads the kernels.
    """
    from fastdiff.bench.blueprints import named
    from fastdiff.bench.pipelines import check_dtype
    from fastdiff.bench.progress import phases
    from fastdiff.bench.source import Source
    from fastdiff.compiler.own_size import jobs_of
    from fastdiff.export.folder import check_new, new_folder
    from fastdiff.families import Sizes
    from fastdiff.kernels.shipped import ship

    known_archs(arch)
    wanted = check_dtype(dtype, "cuda")
    check_new(out)
    source = Source(pipeline, preset)
    plan = named(source, "warm")
    name = preset or source.name
    sizes = [
        Sizes(plan.side, plan.factor, guided, upcast)
        for guided in (True, False)
        for upcast in plan.upcasts
    ]
    jobs = jobs_of(plan.networks, wanted, sorted(set(arch)), sizes)
    what = f"{len(jobs)} kernels of {name} in {dtype}"
    with phases() as bars, new_folder(out) as partial:
        bars.log(f"compiling {what}")
        bars.start("kernels", None, len(jobs))
        ship(partial, f"{name} in {dtype}", jobs, lambda _: bars.step("kernels"))
    print(f"{out}: {what}")
