"""What the contract of `residual` cannot express: refusals."""

import pytest
import torch

from fastdiff.kernels.dispatch import implementation
from fastdiff.kernels.residual import residual


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"enlarge": 0}, "enlarge is 0"),
        ({"other": torch.ones(1, 3, 2, 8)}, r"other is \[1, 3, 2, 8\]; expected \[2, 3, 2, 8\]"),
        ({"shift": torch.ones(1)}, r"shift is \[1\]; expected \[8\]"),
        ({"gate": torch.ones(2, 8)}, r"gate has no other; expected \[2, 8\] and an other"),
        (
            {"gate": torch.ones(1, 8), "other": torch.ones(2, 3, 2, 8)},
            r"gate has \[1, 8\]; expected \[2, 8\]",
        ),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        residual(torch.ones(2, 3, 2, 8), **wrong)


def test_the_kernel_takes_only_contiguous_tensors():
    """It computes addresses without strides."""
    x, run = torch.ones(2, 3, 2, 8), implementation("residual", "triton")
    for wrong in ({"shift": torch.ones(16)[::2]}, {"other": x[:1].expand(2, -1, -1, -1)}):
        with pytest.raises(ValueError, match="must be contiguous"):
            run(x, **wrong)
