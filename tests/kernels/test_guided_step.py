"""What `guided_step` refuses."""

import pytest
import torch

from fastdiff.kernels.guided_step import guided_step
from fastdiff.kernels.guided_step.spec import HISTORY

SAMPLE = (2, 3, 4)


@pytest.mark.parametrize(
    ("output", "given", "message"),
    [
        ((8, 3, 4), (), "4 model outputs per sample; expected 1, 2 or 3"),
        ((3, 3, 4), (), "1.5 model outputs per sample"),
        ((2, 3, 12), (), "outputs of 12 channels for samples of 4; expected as many, or twice"),
        ((2, 3, 4), ("original", "original_noise"), "expected a mask, original and original_noise"),
        ((2, 3, 4), ("mask", "original"), "expected a mask, original and original_noise"),
    ],
)
def test_wrong_arguments_are_refused(output, given, message):
    x = torch.zeros(SAMPLE)
    table, step = torch.zeros(1, HISTORY + 1), torch.zeros(1, dtype=torch.int64)
    extra = {name: torch.zeros(SAMPLE) for name in given}
    with pytest.raises(ValueError, match=message):
        guided_step(torch.zeros(output), x, x.new_zeros(2, 0, *SAMPLE), x, table, step, **extra)
