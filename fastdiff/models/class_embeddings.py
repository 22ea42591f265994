"""Class embeddings of U-Nets, added to the time embedding."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.models.blocks import require
from fastdiff.models.borrow import Loan, Unsupported
from fastdiff.models.checks import checked
from fastdiff.models.embeddings import Embedding, Sinusoid, borrow_embedding
from fastdiff.models.reads import Reader

INDICES = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Classes:
    """What a U-Net computes from `class_labels`: rows of a table; embeddings of timesteps, for
    example of the noise in a picture to enlarge (DeepFloyd IF), or of vectors (Stable unCLIP); or
    they are embeddings already (unCLIP)."""

    width: int
    """Columns of the time embedding."""
    table: Tensor | None = None
    """[classes, width]"""
    sinusoid: Sinusoid | None = None
    embedding: Embedding | None = None

    @property
    def columns(self) -> int | None:
        """The columns of the labels, if they are vectors."""
        if self.table is not None or self.sinusoid is not None:
            return None
        return self.width if self.embedding is None else self.embedding.first.weight.shape[1]

    def example(self, texts: int, weight: Tensor) -> Tensor:
        """Labels of `texts`; one for all of them where a loop gives one."""
        if self.table is not None:
            return torch.zeros(1, dtype=torch.long, device=weight.device)
        shape = (texts,) if self.columns is None else (texts, self.columns)
        return torch.empty(shape, dtype=weight.dtype, device=weight.device)

    def __call__(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """[n], or [n, columns] -> [n, width]"""
        if self.table is not None:
            return F.embedding(labels, self.table)
        if self.embedding is None:
            return labels
        told = labels if self.sinusoid is None else self.sinusoid(labels).to(dtype)
        return self.embedding(told.contiguous())

    def check(self, labels: Tensor | None, weight: Tensor, texts: int) -> None:
        """Raise Unsupported unless there is one label, or one for each of the texts."""
        if labels is None:
            raise Unsupported("class_labels are missing")
        kind, right, dim = "label", True, 1
        if self.table is not None:
            kind, right = "index", labels.dtype in INDICES
        elif self.columns is not None:
            kind, dim = "embedding", 2
            checked("class_labels", labels, weight, self.columns, dim)
        found = f"class_labels are {labels.dtype} of the shape {list(labels.shape)}"
        fits = right and labels.ndim == dim and labels.shape[0] in (1, texts)
        require(fits, f"{found}; expected one {kind} or {texts}")
        where = weight.device
        wrong = f"class_labels on {labels.device}, the weights are on {where}"
        require(labels.device == where, wrong)


def borrow_classes(
    net: Reader, config: Reader, loan: Loan, sinusoid: Sinusoid, time: Embedding
) -> Classes | None:
    """From a U-Net or ControlNet; None if it has no class embeddings.

    sinusoid, time: of its time embedding.
    """
    module: Any = net.class_embedding
    if module is None:
        return None
    kind, width = config.class_embed_type, time.second.weight.shape[0]
    joined = getattr(config, "class_embeddings_concat", False)
    require(not joined, "class embeddings beside the time embedding")
    if kind is None:
        return Classes(width, loan.table(module))
    if kind == "identity":
        loan.open(module, nn.Identity)
        return Classes(width)
    require(kind in ("timestep", "projection"), f"class embeddings of type {kind!r}")
    own = sinusoid if kind == "timestep" else None
    return Classes(width, None, own, borrow_embedding(module, loan))
