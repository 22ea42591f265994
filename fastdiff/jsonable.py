"""Values that JSON can hold."""

import math
from typing import Any


def finite(value: Any) -> Any:
    """`value` with every infinity and NaN in it, at any depth, replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
