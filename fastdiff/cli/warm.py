"""warm: the kernels of a pipeline, compiled here for GPUs that are elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from fastdiff.cli.facts import known_archs
from fastdiff.cli.options import Folder, Preset, app, one_of


@app.command()
def warm(
    out: Annotated[Path, typer.Option(help="A new folder for them.")],
    arch: Annotated[
        list[int], typer.Option(help="80, 86, 89, 90, 100, 120, …; as often as wanted.")
    ],
    folder: Folder = None,
    preset: Preset = None,
    dtype: Annotated[str, typer.Option(help="fp16, bf16 or fp32.")] = "fp16",
) -> None:
    """Compile a pipeline's kernels for GPUs that are not here: fastdiff.Options(warm=OUT)."""
    from fastdiff.bench.blueprints import of_folder, of_preset
    from fastdiff.bench.pipelines import check_dtype
    from fastdiff.bench.progress import phases
    from fastdiff.compiler.own_size import jobs_of
    from fastdiff.demo import DEMO_FOLDER
    from fastdiff.export.folder import check_new, new_folder
    from fastdiff.families import Sizes
    from fastdiff.kernels.shipped import ship

    known_archs(arch)
    one_of(folder, preset)
    wanted = check_dtype(dtype, "cuda")
    check_new(out)
    plan = of_preset(preset) if preset else of_folder(folder or DEMO_FOLDER)
    name = preset or (folder.resolve().name if folder else "demo")
    sizes = [
        Sizes(plan.side, plan.factor, guided, upcast)
        for guided in (True, False)
        for upcast in plan.upcasts
    ]
    jobs = jobs_of((plan.denoiser, plan.vae), wanted, sorted(set(arch)), sizes)
    what = f"{len(jobs)} kernels of {name} in {dtype}"
    with phases() as bars, new_folder(out) as partial:
        bars.log(f"compiling {what}")
        bars.start("kernels", None, len(jobs))
        ship(partial, f"{name} in {dtype}", jobs, lambda _: bars.step("kernels"))
    print(f"{out}: {what}")
