"""What `callback_on_step_end` returned, in place of a loop's variables."""

from typing import Any

from torch import Tensor

from fastdiff.errors import UserError


def as_tensor(name: str, value: Any) -> Tensor:
    """`value`, if it is a tensor; the callback returned it as `name`."""
    if not isinstance(value, Tensor):
        raise UserError(
            f"callback_on_step_end returned a {type(value).__name__} as {name}; return a tensor"
        )
    return value


def listed(value: Any) -> list[Any]:
    """A list as it is, anything else as its only entry."""
    return value if isinstance(value, list) else [value]


def like(name: str, value: Any, own: Tensor | list[Tensor]) -> list[Tensor]:
    """The tensors of `value`, which takes the place of `own`: a tensor, or a list of as many."""
    if isinstance(own, list) and (not isinstance(value, list) or len(value) != len(own)):
        got = f"{len(value)} tensors" if isinstance(value, list) else f"a {type(value).__name__}"
        raise UserError(
            f"callback_on_step_end returned {got} as {name}; return a list of {len(own)} tensors"
        )
    return [as_tensor(name, one) for one in (value if isinstance(own, list) else [value])]
