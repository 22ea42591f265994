"""How a painter opens its pipeline: here, or in a replica on another machine."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastdiff.bench.source import Source

if TYPE_CHECKING:
    from fastdiff.serve.painter import Painter


@dataclass(frozen=True)
class Opening:
    """The settings that open and compile a pipeline. It pickles.

    dtype, device: names as on the command line; None: the default of the machine that opens it.
    The other fields are the painter's.
    """

    source: Source
    dtype: str | None
    device: str | None
    capacity: int
    workers: int
    steps: int
    guidance_scale: float | None
    pixels: int | None

    def painter(self) -> "Painter":
        """The painter. UserError if the pipeline cannot be opened or used for drawing."""
        import fastdiff
        from fastdiff.bench.pipelines import check_device, check_dtype, check_steps
        from fastdiff.bench.source import opened, placed
        from fastdiff.serve.painter import Painter

        device = check_device(self.device)
        pipe = opened(self.source, check_dtype(self.dtype, device), device).to(device)
        check_steps(pipe, self.steps)
        guidance = self.guidance_scale
        if guidance is None and placed(self.source.pipeline) is None:
            guidance = 4.0
        pipe.set_progress_bar_config(disable=True)
        fastdiff.compile(pipe)
        return Painter(
            *(pipe, self.capacity, self.workers),
            steps=self.steps,
            guidance_scale=guidance,
            pixels=self.pixels,
        )
