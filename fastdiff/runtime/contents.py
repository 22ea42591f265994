"""Digests of an object's data, and a check whether its attributes have changed."""

import hashlib
import marshal
from collections.abc import Iterable, Mapping
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.models.watch import version


def digest_of(value: Any) -> str | None:
    """A digest of the data in `value`, different for different data; None if some cannot be
    compared."""
    digest = hashlib.sha256()
    try:
        for part in _content(value):
            digest.update(len(part).to_bytes(8, "big") + part)
    except TypeError:
        return None
    return digest.hexdigest()


class Standing:
    """Remembers an object's attributes; an edit in place counts as a change."""

    def __init__(self, instance: Any) -> None:
        self._instance, self._values = instance, dict(vars(instance))
        self._versions = {
            name: version(value)
            for name, value in self._values.items()
            if isinstance(value, Tensor)
        }

    def holds(self) -> bool:
        """Whether all attributes still equal their former values."""
        now, before = vars(self._instance), self._values
        if any(version(before[name]) != count for name, count in self._versions.items()):
            return False
        if now.keys() == before.keys() and all(now[name] is before[name] for name in before):
            return True
        digest = digest_of(now)
        return digest is not None and digest == digest_of(before)


def _content(value: Any) -> Iterable[bytes]:
    """Bytes that differ for different values. TypeError if `value` is not made of data."""
    yield type(value).__qualname__.encode()
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield repr((value.dtype, value.shape)).encode()
        yield value.tobytes()
    elif isinstance(value, Mapping):
        yield repr(list(value)).encode()
        yield from _content(list(value.values()))
    elif isinstance(value, list | tuple):
        yield str(len(value)).encode()
        for item in value:
            yield from _content(item)
    elif isinstance(value, FunctionType):
        code = value.__code__
        outside = code.co_names or code.co_freevars or value.__defaults__ or value.__kwdefaults__
        if outside or any(isinstance(constant, CodeType) for constant in code.co_consts):
            raise TypeError("the function depends on more than its code")
        yield marshal.dumps(code)
    elif isinstance(value, str | int | float | np.generic | torch.dtype | torch.device | None):
        yield repr(value).encode()
    else:
        raise TypeError(f"cannot compare a {type(value).__name__}")
