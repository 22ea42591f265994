"""`qk_norm` on a CPU: torch's RMSNorm, then the rotation."""

from torch import Tensor

from fastdiff.kernels.qk_norm.spec import check, reference


def run(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check(q, k, q_weight, k_weight, cos, sin)
    return reference(q, k, q_weight, k_weight, eps, cos, sin)
