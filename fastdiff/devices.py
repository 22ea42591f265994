"""What torch can compute with here."""

import torch


def refusal(device: str | torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why torch cannot compute in `dtype` on `device`, in its own first line; None where it can."""
    try:
        one = torch.ones(1, 1, device=device, dtype=dtype)
        torch.nn.functional.silu(one @ one)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:  # each back end its own
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None
