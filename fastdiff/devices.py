"""Which devices and dtypes torch can compute with on this machine."""

import torch


def refusal(device: str | torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """The reason why torch cannot compute in `dtype` on `device`: the first line of its error. None
    if it can."""
    try:
        one = torch.ones(1, 1, device=device, dtype=dtype)
        torch.nn.functional.silu(one @ one)
    # each back end raises another class
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None
