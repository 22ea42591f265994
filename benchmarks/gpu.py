"""Everything worth measuring while a GPU is at hand, in one run: `make gpu`.

First whether each Triton kernel computes the right thing on real silicon, then its time against
plain torch and against torch's best attention, each with its fraction of the roofline; then whole
pipelines through `fastdiff bench`, their launches through `fastdiff count`, what a new picture size
and another LoRA cost, and a TensorRT engine beside them. Raw samples go to OUT/*.json, a short
table to the terminal.

    python benchmarks/gpu.py --out OUT [--dry-run] [--only PART,…]
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdiff import compile
from fastdiff.bench.kernels import check, floor_ms, inputs_of, sampler
from fastdiff.bench.machine import commit, machine, versions
from fastdiff.bench.presets import build
from fastdiff.bench.results import write_file
from fastdiff.bench.timing import clock
from fastdiff.kernels.contract import Case, KernelSpec, verify
from fastdiff.kernels.dispatch import Kernel, all_kernels

PARTS = ("verify", "kernels", "sd15", "sdxl", "count", "changes", "engines")
REPLAYS = 21
PIPELINES = {
    "sd15": ["--preset", "sd15", "--steps", "20", "--rounds", "9"],
    "sdxl": ["--preset", "sdxl", "--steps", "20", "--rounds", "7"],
}


def kernels_with_triton() -> list[Kernel]:
    return [kernel for kernel in all_kernels().values() if "triton" in kernel.implementations]


def check_all(device: str, which: str) -> list[dict]:
    rows = []
    for kernel in kernels_with_triton():
        for case, dtype in itertools.product(kernel.spec.cases, kernel.spec.dtypes):
            row = {"kernel": kernel.spec.name, "case": case.name, "dtype": str(dtype)}
            try:
                verdicts = verify(kernel.spec, kernel.implementations[which](), case, dtype, device)
                row["errors"] = [(v.output, v.error, v.allowed) for v in verdicts]
                row["passed"] = all(v.passed for v in verdicts)
            except Exception as error:  # one kernel that does not launch must not end the run
                row |= {"passed": False, "exception": repr(error)}
            rows.append(row)
            if not row["passed"]:
                print("FAILED", row)
    print(f"verify: {sum(r['passed'] for r in rows)} of {len(rows)} inside the budget")
    return rows


def rivals(spec: KernelSpec, inputs: dict) -> dict[str, Callable[[], object]]:
    runs: dict[str, Callable[[], object]] = {"eager": lambda: spec.reference(**inputs)}
    if spec.name != "attention":
        return runs
    q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
    for backend in (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
    ):

        def run(backend: SDPBackend = backend) -> object:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    q, k, v, inputs["mask"], scale=inputs["scale"]
                )

        runs[f"sdpa {backend.name.removesuffix('_ATTENTION').lower()}"] = run
    return runs


def time_case(kernel: Kernel, case: Case, device: str, which: str) -> dict:
    spec, place = kernel.spec, torch.device(device)
    dtype = torch.float32 if device == "cpu" else torch.float16
    ours = kernel.implementations[which]()
    sets = [
        {"ours": partial(ours, **inputs)} | rivals(spec, inputs)
        for inputs in inputs_of(kernel, case, dtype, place)
    ]
    times = {}
    for name in sets[0]:
        try:
            if name == "ours":
                check(kernel, case, dtype, place, which)
            sample = sampler([runs[name] for runs in sets], place)
            times[name] = [sample() for _ in range(REPLAYS)]
        except Exception as error:  # a backend that does not take this shape is a result, too
            times[name] = repr(error)
    row = {"kernel": spec.name, "case": case.name, "samples_ms": times}
    return row | {"floor_ms": floor_ms(kernel, case, dtype, place)}


def time_all(device: str, which: str) -> list[dict]:
    rows = []
    for kernel in kernels_with_triton():
        for case in kernel.spec.cases:
            with torch.no_grad():
                row = time_case(kernel, case, device, which)
            rows.append(row)
            times = {k: median(v) for k, v in row["samples_ms"].items() if isinstance(v, list)}
            shown = "  ".join(f"{name} {1e3 * ms:.1f}" for name, ms in times.items())
            known = row["floor_ms"] and "ours" in times
            share = f"  roofline {row['floor_ms'] / times['ours']:.0%}" if known else ""
            print(f"{row['kernel']:16} {row['case']:18} {shown} us{share}")
    return rows


def bench(part: str, out: Path, dry_run: bool) -> None:
    options = [*PIPELINES[part], "--backends", "eager,channels_last,inductor,networks,fastdiff"]
    if dry_run:
        options = [*options[:2], "--scale", "0.13", "--steps", "2", "--rounds", "2"]
        options += ["--backends", "eager,networks,fastdiff"]
    file = str(out / f"{part}.json")
    subprocess.run([sys.executable, "-m", "fastdiff", "bench", *options, "--json", file])


def count(out: Path, dry_run: bool) -> None:
    options = ["--preset", "sd15", "--steps", "3", "--json", str(out / "count-sd15.json")]
    options += ["--scale", "0.13"] if dry_run else []
    subprocess.run([sys.executable, "-m", "fastdiff", "count", *options])


def engines(out: Path, dry_run: bool) -> None:
    """Build SD1.5's engines for this GPU and race them; what a builder refuses is kept, too."""
    folder, fastdiff = out / "engines", [sys.executable, "-m", "fastdiff"]
    preset = ["--preset", "sd15", *(["--scale", "0.13"] if dry_run else [])]
    build = [*fastdiff, "export", *preset, "--trt", str(folder)]
    built = subprocess.run(
        [*build, *(["--target", "sm_89"] if dry_run else [])], text=True, capture_output=True
    )
    said = {"command": build, "rc": built.returncode, "said": built.stderr[-2000:]}
    (out / "engines-build.json").write_text(json.dumps(said, indent=1))
    print(built.stdout, built.stderr)
    if built.returncode == 0:
        race = ["--backends", "eager,fastdiff,tensorrt", "--engines", str(folder)]
        race += ["--rounds", "2", "--steps", "2"] if dry_run else []
        file = str(out / "engines.json")
        subprocess.run([*fastdiff, "bench", *preset, *race, "--json", file])


def time_changes(device: str, dry_run: bool) -> list[dict]:
    """Milliseconds that the first picture of a new size and a switch of LoRA adapters add."""
    place = torch.device(device)
    dtype = torch.float32 if dry_run else torch.float16
    pipe = build("sd15", 0.13 if dry_run else 1.0, dtype, device)
    pipe.set_progress_bar_config(disable=True)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    rows = []

    def timed(run: Callable[[], object]) -> float:
        start = clock(place)
        run()
        return 1e3 * (clock(place) - start)

    def draw(width: int) -> None:
        pipe("red heart", height=side, width=width, num_inference_steps=4)

    try:
        from peft import LoraConfig

        for name, rank in (("one", 4), ("two", 64)):
            targets = ["to_q", "to_k", "to_v", "to_out.0"]
            config = LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)
            pipe.unet.add_adapter(config, name)
    except ImportError as missing:
        rows.append({"change": "lora", "unavailable": str(missing)})
    compile(pipe)
    for _ in range(2):
        draw(side)
    for width in (side + 64, side + 128, side + 192):
        first = timed(lambda width=width: draw(width))
        again = [timed(lambda width=width: draw(width)) for _ in range(5)]
        rows.append({"change": "new width", "first_ms": first, "again_ms": again})
    slot = pipe.unet._compiled_call_impl
    with torch.no_grad():
        for name in ("one", "two", "one", "two") if len(rows) == 3 else ():
            pipe.unet.set_adapters(name)
            rows.append({"change": "lora", "switch_ms": timed(slot.offer)})
    for row in rows:
        print(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts")
    parser.add_argument("--dry-run", action="store_true", help="the CPU kernels, small pipelines")
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only names {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no NVIDIA GPU here; --dry-run tries the script on the CPU")
    device, which = ("cpu", "cpu") if options.dry_run else ("cuda", "triton")
    options.out.mkdir(parents=True, exist_ok=True)
    facts = {"machine": machine(), "versions": versions(), "commit": commit()}
    collectors = {
        "verify": lambda: check_all(device, which),
        "kernels": lambda: time_all(device, which),
        "changes": lambda: time_changes(device, options.dry_run),
    }
    for part, collect in collectors.items():
        if part in parts:
            result = json.dumps(facts | {"rows": collect()}, indent=1)
            write_file(
                options.out / f"{part}.json", lambda path, text=result: path.write_text(text)
            )
    for part in PIPELINES:
        if part in parts:
            bench(part, options.out, options.dry_run)
    if "count" in parts:
        count(options.out, options.dry_run)
    if "engines" in parts:
        engines(options.out, options.dry_run)


if __name__ == "__main__":
    main()
