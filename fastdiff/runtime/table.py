"""A scheduler's steps as a table of coefficients."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels.guided_step.spec import (
    CLIP_SAMPLE,
    GUIDANCE,
    HISTORY,
    KEPT_NOISE,
    KEPT_ORIGINAL,
    LEARNED,
    NEXT_SCALE,
    NOISE,
    PERTURBED,
    QUANTILE,
    RESCALE,
    SAMPLE,
)
from fastdiff.runtime.guidance import Guidance

UNGUIDED = Guidance()


@dataclass(frozen=True)
class Table:
    """One row per call of the network. All tensors on the CPU, coefficients in float64."""

    timesteps: Tensor
    """[n] the timesteps that the network receives."""
    scales: Tensor
    """[n] s: factor of the sample in the network's input."""
    samples: Tensor
    """[n] a."""
    outputs: Tensor
    """[n, M+1] b_0..b_M."""
    past_samples: Tensor
    """[n, M] c_1..c_M."""
    noises: Tensor
    """[n] d."""
    learned: Tensor
    """[n] k: the noise's factor is d exp(k y), where y is the network's output for the variance."""
    clips: Tensor
    """[n, 5] p, q, r, t and h of `clipping`; zeros for a step that clips nothing."""
    draws: tuple[bool, ...]
    """Whether the scheduler draws noise in each step, even unused: the generator must advance."""
    noise_dtype: torch.dtype | None
    """The dtype in which noise is drawn; None: the network's."""
    residual: float
    """Largest deviation of a step from the recurrence, relative to its result."""
    states: tuple[Mapping[str, Any], ...]
    """The plain attributes that steps change, such as `_step_index`, with their values after each
    step."""
    keeps: tuple[str, ...]
    """Other attributes that steps change, such as past predictions. If there are none, a callback
    may change the samples between the steps."""
    editable: bool
    """Whether the table also holds if samples change between the steps (inpainting)."""

    @property
    def depth(self) -> int:
        """M: the number of past steps in the recurrence."""
        return self.past_samples.shape[1]

    @property
    def variance(self) -> bool:
        """Whether the network must predict the variance."""
        return bool(self.learned.any())

    @property
    def thresholds(self) -> bool:
        """Whether steps clip each sample by that sample's own quantile."""
        return bool(self.clips[:, -1].any())

    def rows(
        self,
        guidance: Guidance = UNGUIDED,
        factors: Tensor | None = None,
        depth: int | None = None,
    ) -> Tensor:
        """[n, 15 + 2M + 1] float64: the table that `kernels.guided_step` reads.

        factors: of `Inpainting`. depth: M, if more past steps are kept than these rows use.
        """
        count, own = len(self.timesteps), self.depth
        depth = own if depth is None else depth
        rows = torch.zeros(count, HISTORY + 1 + 2 * depth, dtype=torch.float64)
        for column, value in zip((GUIDANCE, RESCALE, PERTURBED), guidance, strict=True):
            rows[:, column] = torch.as_tensor(value, dtype=torch.float64, device="cpu")
        if factors is not None:
            rows[:, KEPT_ORIGINAL : KEPT_NOISE + 1] = factors
        rows[:, SAMPLE] = self.samples
        rows[:, NOISE] = self.noises
        rows[:, LEARNED] = self.learned
        rows[:, CLIP_SAMPLE : QUANTILE + 1] = self.clips
        rows[:-1, NEXT_SCALE] = self.scales[1:]
        rows[-1, NEXT_SCALE] = 1.0
        rows[:, HISTORY : HISTORY + own + 1] = self.outputs
        past = HISTORY + depth + 1
        rows[:, past : past + own] = self.past_samples
        return rows
