"""The program that test_add_a_network.py runs in a separate process, on a copy of fastdiff to which
Quilt was added. It writes its results to seen.json."""

import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from logged import as_warnings
from quilt import QuiltPipeline, QuiltTransformer2DModel

import fastdiff
from fastdiff.bench import counters, graph
from fastdiff.bench.gpus import gpu_named
from fastdiff.bench.preset_parts import Text, clip, clip_tokenizer, vae_config
from fastdiff.bench.tally import total
from fastdiff.compiler.slot import slot_of
from fastdiff.engines.ort import Session
from fastdiff.export import onnx
from fastdiff.export.parity import verify_part
from fastdiff.export.parts import parts
from fastdiff.kernels.contract import judge

STEPS, SIDE = 3, 64


def made() -> Any:
    """A pipeline with random weights, the same each time."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    pipe = QuiltPipeline(
        QuiltTransformer2DModel().eval(),
        AutoencoderKL(**vae_config(0.1, 1.0), norm_num_groups=8).eval(),
        clip(Text(64, 1, "quick_gelu"), tokenizer, projection=False),
        tokenizer,
        FlowMatchEulerDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, output_type: str = "latent", **options: Any) -> torch.Tensor:
    """Two pictures from latents that are not square."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 6, generator=generator)
    return pipe(
        ["red heart", "blue fish"],
        height=SIDE,
        width=48,
        num_inference_steps=STEPS,
        latents=latents.to(pipe.transformer.dtype),
        output_type=output_type,
        **options,
    ).images


def drawn(pipe: Any, eager: Any, **options: Any) -> list[float]:
    """Our error against float64, and the error that the budget allows."""
    exact = draw(copy.deepcopy(eager).to(torch.float64), **options)
    verdict = judge("latents", draw(pipe, **options), draw(eager, **options), exact)
    return [verdict.error, verdict.allowed]


def main(folder: Path) -> dict[str, Any]:
    as_warnings()
    warnings.simplefilter("error", RuntimeWarning)  # a call that runs eagerly fails
    eager, pipe = made(), fastdiff.compile(made())
    errors = {
        "guided": drawn(pipe, eager),
        "decoded": drawn(pipe, eager, output_type="pt"),
        "unguided": drawn(pipe, eager, guidance_scale=1.0),
        "callback": drawn(
            pipe,
            eager,
            callback_on_step_end=lambda p, i, t, seen: {"latents": 0.9 * seen["latents"]},
        ),
    }
    planned = {part.name: [part.runs, part.why] for part in fastdiff.report(pipe).parts}
    counted = {
        name: total(counters.count_pictures(one, SIDE, SIDE).step).launches
        for name, one in (("eager", eager), ("fastdiff", pipe))
    }
    with torch.device("meta"):
        bare = QuiltTransformer2DModel().eval()
    launches = graph.rows(bare, gpu_named("h100"), torch.float16, side=16)
    (part, *_) = [part for part in parts(eager, torch.float32) if part.folder == "transformer"]
    onnx.export(eager, (part,), folder / "onnx", 20, lambda line: None)
    rows = verify_part(part, Session(folder / "onnx" / part.file, torch.device("cpu")))

    in_engine = fastdiff.compile(made(), backend="ort", engines=folder / "onnx")
    errors["in an engine"] = drawn(in_engine, eager)
    planned["engine"] = [part.runs for part in fastdiff.report(in_engine).parts[:1]]

    # a block whose attributes change is borrowed again; a block with a patched method is refused
    slot = slot_of(pipe.transformer)
    pipe.transformer.blocks[0].heads = eager.transformer.blocks[0].heads = 4
    errors["changed"] = drawn(pipe, eager)
    block = type(pipe.transformer.blocks[0])
    own, block.split_heads = block.split_heads, lambda self, x: own(self, x)
    refused = ""
    try:
        with torch.no_grad():
            slot.offer()
    except ValueError as reason:
        refused = str(reason)
    block.split_heads = own
    return {
        "fastdiff": fastdiff.__file__,
        "native": sys.modules["fastdiff._C"].__file__,
        "errors": errors,
        "report": planned,
        "launches a step": counted,
        "launches": {row.kernel: row.launches for row in launches},
        "exported": [[row.output, row.case, row.passed] for row in rows],
        "refused": refused,
    }


if __name__ == "__main__":
    here = Path(sys.argv[1])
    (here / "seen.json").write_text(json.dumps(main(here)))
