"""Class embeddings of U-Nets: a row of a table, added to the time embedding."""

from typing import Any

import torch
from torch import Tensor

from fastdiff.models.blocks import require
from fastdiff.models.borrow import Loan, Unsupported
from fastdiff.models.checks import refuse
from fastdiff.models.reads import Reader

INDICES = (torch.int32, torch.int64)


def borrow_classes(net: Reader, config: Reader, loan: Loan) -> Tensor | None:
    """The table [classes, D] of a U-Net or ControlNet; None if it has no class embeddings."""
    table: Any = net.class_embedding
    if table is None:
        return None
    kind = config.class_embed_type
    require(kind is None, f"class embeddings of type {kind!r}")
    joined = getattr(config, "class_embeddings_concat", False)
    require(not joined, "class embeddings beside the time embedding")
    return loan.table(table)


def check_labels(
    labels: Tensor | None, classes: Tensor | None, latents: Tensor, copies: int
) -> None:
    """Raise Unsupported unless there is one label, or one for each picture, of a network with class
    embeddings."""
    if classes is None:
        return refuse(class_labels=labels)
    if labels is None:
        raise Unsupported("class_labels are missing")
    counts = (1, copies * latents.shape[0])
    require(
        labels.ndim == 1 and labels.shape[0] in counts and labels.dtype in INDICES,
        f"class_labels are {labels.dtype} of the shape {list(labels.shape)}; expected one index"
        f" or {counts[1]}",
    )
    where = classes.device
    require(labels.device == where, f"class_labels on {labels.device}, the weights are on {where}")
