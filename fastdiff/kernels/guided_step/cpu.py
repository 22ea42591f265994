"""`guided_step` on a CPU: latents are a few thousand numbers, so torch's own ops do."""

from fastdiff.kernels.guided_step.spec import reference as run

__all__ = ["run"]
