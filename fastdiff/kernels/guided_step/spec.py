"""Contract of `guided_step`; imports only torch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels.contract import Case, KernelSpec

GUIDANCE, RESCALE, PERTURBED, SAMPLE, NOISE, LEARNED, NEXT_SCALE = range(7)
CLIP_SAMPLE, CLIP_OUTPUT, LIMIT, CEILING, QUANTILE = range(7, 12)
KEPT_ORIGINAL, KEPT_NOISE, HISTORY = range(12, 15)
"""The columns of a table row. From HISTORY on: b_0..b_M for the outputs, then c_1..c_M for the
samples, where M is the depth of the history."""


@dataclass(slots=True)
class Arguments:
    """The op's arguments; see its public function."""

    model_output: Tensor
    sample: Tensor
    history: Tensor
    following: Tensor
    table: Tensor
    step: Tensor
    noise: Tensor | None = None
    mask: Tensor | None = None
    original: Tensor | None = None
    original_noise: Tensor | None = None
    limits: Tensor | None = None


def formula(a: Arguments) -> None:
    if len(a.step) == 1:
        _step(a)
        return
    for picture, step in enumerate(a.step):
        if step >= 0:
            _step(_alone(a, picture))


def _alone(a: Arguments, picture: int) -> Arguments:
    """The arguments of one sample, in the same memory."""
    part, output = slice(picture, picture + 1), a.model_output
    of_each = output.view(-1, a.sample.shape[0], *output.shape[1:])
    values = (getattr(a, name) for name in ("noise", "mask", "original", "original_noise"))
    return Arguments(
        of_each[:, picture],
        *(a.sample[part], a.history[:, :, part], a.following[part], a.table, a.step[part]),
        *(None if value is None else value[part] for value in (*values, a.limits)),
    )


def _step(a: Arguments) -> None:
    depth, batch = a.history.shape[1], a.sample.shape[0]
    index = int(a.step)
    row = a.table[index]
    # the network's channels are those of the sample, and perhaps as many for the variance
    outputs = a.model_output.to(a.sample.dtype).split(a.sample.shape[-1], dim=-1)
    output, *others = outputs[0].split(batch)
    if others:
        text = others[0]
        output = output + row[GUIDANCE] * (text - output)
        if len(others) > 1:
            apart = row[PERTURBED] * (text - others[1])
            output = output + torch.where(row[PERTURBED] != 0, apart, 0.0)
        over = tuple(range(1, output.ndim))
        rescaled = output * (text.std(over, keepdim=True) / output.std(over, keepdim=True))
        output = torch.where(
            row[RESCALE] != 0, row[RESCALE] * rescaled + (1 - row[RESCALE]) * output, output
        )
    b, c = row[HISTORY : HISTORY + depth + 1], row[HISTORY + depth + 1 :]
    result = row[SAMPLE] * a.sample + b[0] * output
    clean = row[CLIP_SAMPLE] * a.sample + row[CLIP_OUTPUT] * output
    limit = row[LIMIT]
    if a.limits is not None:
        least = clean.abs().flatten(1).quantile(row[QUANTILE], dim=1)
        a.limits.copy_(least.maximum(limit).minimum(row[CEILING]))
        limit = a.limits.view(batch, *[1] * (clean.ndim - 1))
    clipped = torch.maximum(torch.minimum(clean, limit), -limit) * (row[LIMIT] / limit)
    result = result + torch.where(row[LIMIT] != 0, clipped, 0.0)
    for h in range(1, depth + 1):
        slot = (index - h) % depth
        # entries with a zero coefficient may not be written yet, so mask them
        result = result + torch.where(b[h] != 0, b[h] * a.history[0, slot], 0.0)
        result = result + torch.where(c[h - 1] != 0, c[h - 1] * a.history[1, slot], 0.0)
    if a.noise is not None:
        factor = row[NOISE]
        if len(outputs) > 1:
            variance = outputs[1].split(batch)[1 if others else 0]
            factor = factor * torch.where(row[LEARNED] != 0, row[LEARNED] * variance, 0.0).exp()
        result = result + factor * a.noise
    if a.mask is not None:
        kept = a.sample
        if a.original is not None and a.original_noise is not None:
            kept = row[KEPT_ORIGINAL] * a.original + row[KEPT_NOISE] * a.original_noise
        result = a.mask * result + (1 - a.mask) * kept
    if depth:
        a.history[0, index % depth] = output
        a.history[1, index % depth] = a.sample
    a.sample.copy_(result)
    a.following.copy_(row[NEXT_SCALE] * result)


def fake(*args: Any, **kwargs: Any) -> None:
    """Does nothing: the formula reads the step on the host, which a fake must not."""


def inputs(
    case: Case, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    shape = (case.B, case.Y, case.X, case.C)
    rows, depth = 5, case.depth
    table = normal(rows, HISTORY + 1 + 2 * depth)
    table[:, GUIDANCE] = 7.5
    table[:, RESCALE] = case.get("rescale", 0.0)
    table[:, PERTURBED] = case.get("perturbed", 0.0)
    table[:, LEARNED] = case.get("learned", 0.0)
    table[:, LIMIT] = case.get("limit", 0.0)
    table[:, CEILING] = case.get("ceiling", 0.0)
    table[:, QUANTILE] = case.get("quantile", 0.0)
    history = normal(2, depth, *shape)
    if case.get("fresh"):  # the first step: the history is empty, its coefficients are zero
        table[:, HISTORY + 1 :] = 0
        history.fill_(float("nan"))
    state = torch.float64 if dtype == torch.float64 else torch.float32

    def picture(given: bool) -> Tensor | None:
        return normal(*shape).to(state) if given else None

    channels = case.C * (1 + case.get("wide", False))
    kept = case.get("kept", "")
    return {
        "model_output": normal(case.copies * case.B, *shape[1:3], channels).to(dtype),
        "sample": (normal(*shape) * case.get("spread", 1.0)).to(state),
        "history": history.to(state),
        "following": torch.full(shape, float("nan"), dtype=dtype, device=device),
        "table": table.to(state),
        "step": torch.tensor(case.get("steps", [case.get("step", 3)]), device=device),
        "noise": picture(case.get("noise", False)),
        "mask": torch.rand(shape, generator=generator, device=device).to(state) if kept else None,
        "original": picture(kept == "original"),
        "original_noise": picture(kept == "original"),
        "limits": torch.full((case.B,), float("nan"), dtype=state, device=device)
        if case.get("quantile")
        else None,
    }


def _pictures(case: Case) -> int:
    """Those that are stepped."""
    return sum(step >= 0 for step in case.get("steps", range(case.B)))


def _elements(case: Case) -> int:
    return int(_pictures(case) * case.Y * case.X * case.C)


def moved(case: Case, size: int) -> int:
    """State and table are float32; of a row, only the columns that the case uses are read."""
    past, kept = 0 if case.get("fresh") else 2 * case.depth, case.get("kept", "")
    noise, learns = bool(case.get("noise")), bool(case.get("wide"))
    reads = case.copies - (case.copies == 3 and not case.get("perturbed"))
    reads += bool(case.get("learned"))
    state = 2 + past + 2 * bool(case.depth) + noise
    state += bool(kept) + 2 * (kept == "original")
    columns = 5 + min(case.copies - 1, 1) + (case.copies == 3) + 2 * case.depth
    columns += 2 * bool(case.get("quantile"))
    columns += noise * (1 + learns) + 2 * bool(case.get("limit")) + 2 * (kept == "original")
    limits = 2 * _pictures(case) * bool(case.get("quantile"))  # written, then read
    steps = case.get("steps", (0,))
    columns *= len({step for step in steps if step >= 0})
    each = _elements(case) * (size * (reads + 1) + 4 * state)
    return int(each + 4 * (columns + limits) + 8 * len(steps))


def operations(case: Case) -> int:
    """Without rescaling, which each program of the kernel repeats over its whole sample."""
    each = 4 + 3 * (case.copies - 1) + 4 * case.depth + 2 * bool(case.get("noise"))
    each += 4 * bool(case.get("limit"))  # min and max are not arithmetic
    if case.get("noise") and case.get("wide"):
        each += 3
    if case.get("kept"):
        each += 4 + 3 * (case.kept == "original")
    return int(_elements(case) * each)


LEARNED_NOISE = {"wide": True, "learned": -1.7, "noise": True, "limit": 0.7}
EVERYTHING = {"perturbed": -1.5, "rescale": 0.3, "kept": "original", "repeats": True}
THRESHOLD = {"quantile": 0.77, "ceiling": 1.4, "repeats": True}
ALONE = {**LEARNED_NOISE, "steps": (-1, 4, 4)}
APART = {"steps": (-3, 4), "limit": 0.9}
CASES = (
    Case("sd15-cfg", B=1, Y=64, X=64, C=4, copies=2, depth=0),
    Case("sdxl-cfg-multistep", B=1, Y=128, X=128, C=4, copies=2, depth=3),
    Case("sdxl-ancestral", B=2, Y=64, X=64, C=4, copies=2, depth=0, noise=True, spread=14.6),
    Case("lcm-no-guidance", B=1, Y=64, X=64, C=4, copies=1, depth=0, noise=True),
    Case("rescaled", B=2, Y=64, X=64, C=4, copies=2, depth=1, rescale=0.7, repeats=True),
    Case("ddpm-clipped", B=2, Y=32, X=32, C=3, copies=1, depth=0, noise=True, limit=0.7),
    Case("pag", B=1, Y=64, X=64, C=4, copies=3, depth=2, perturbed=3.0),
    Case("unused", B=1, Y=8, X=16, C=4, copies=3, depth=0, wide=True),
    Case("inpainting", B=2, Y=64, X=64, C=4, copies=2, depth=0, kept="original"),
    Case("learned", B=1, Y=16, X=16, C=3, copies=2, depth=0, kept="sample", **LEARNED_NOISE),
    Case("threshold", B=1, Y=8, X=16, C=3, copies=2, depth=0, **THRESHOLD, **LEARNED_NOISE),
    Case("demo", B=1, Y=16, X=16, C=4, copies=2, depth=1),
    Case("first-step", B=2, Y=16, X=16, C=4, copies=2, depth=2, fresh=True, step=0),
    Case("odd", B=3, Y=33, X=17, C=5, copies=2, depth=2, rescale=0.3, noise=True, repeats=True),
    Case("odd-learned", B=2, Y=3, X=5, C=3, copies=3, depth=1, **LEARNED_NOISE, **EVERYTHING),
    Case("odd-threshold", B=2, Y=3, X=5, C=3, copies=1, depth=1, limit=0.9, **THRESHOLD),
    Case("places", B=4, Y=16, X=16, C=4, copies=2, depth=3, noise=True, steps=(3, -1, 0, 2)),
    Case("odd-places", B=3, Y=3, X=5, C=3, copies=3, depth=2, **ALONE, **EVERYTHING),
    Case("threshold-places", B=2, Y=3, X=5, C=3, copies=1, depth=0, **APART, **THRESHOLD),
    Case("tiny", B=1, Y=1, X=3, C=4, copies=1, depth=1, step=4),
)

SPEC = KernelSpec(
    name="guided_step",
    arguments=Arguments,
    formula=formula,
    fake=fake,
    inputs=inputs,
    cases=CASES,
    bytes=moved,
    flops=operations,
    mutates=("sample", "history", "following", "limits"),
)
