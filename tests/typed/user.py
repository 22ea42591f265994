"""A user's code: `mypy --strict` accepts it, and reveals each type that the comment below it
names."""

from pathlib import Path
from typing import reveal_type

import fastdiff

pipe = fastdiff.load_demo()
reveal_type(pipe)
# diffusers.StableDiffusionPipeline
reveal_type(fastdiff.compile(pipe))
# diffusers.StableDiffusionPipeline
reveal_type(fastdiff.compile(pipe, backend="ort", engines=Path("out")))
# diffusers.StableDiffusionPipeline
reveal_type(fastdiff.compile(pipe, fastdiff.Options(ignore=("vae",), tactics=False)))
# diffusers.StableDiffusionPipeline
reveal_type(fastdiff.restore(pipe))
# diffusers.StableDiffusionPipeline

options = fastdiff.Options(warm="kernels", vae_tiling="exact")
reveal_type(options)
# fastdiff.compiler.options.Options
reveal_type(options.ignore)
# tuple[str, ...]
reveal_type(options.engines)
# str | pathlib.Path | None
reveal_type(options.tactics)
# bool

report = fastdiff.report(pipe)
reveal_type(report)
# fastdiff.compiler.Report
reveal_type(report.parts)
# tuple[fastdiff.compiler.Part, ...]
reveal_type([(part.name, part.runs, part.why) for part in report.parts])
# list[tuple[str, str, str]]
reveal_type(report.note)
# str | None

costs = fastdiff.roofline(pipe, "h200", steps=20)
reveal_type(costs)
# fastdiff.bench.roofline.Roofline
reveal_type(costs.rows)
# tuple[fastdiff.bench.roofline.Priced, ...]
reveal_type(costs.step_ms)
# float
reveal_type(str(costs))
# str

reveal_type(fastdiff.__version__)
# str
