"""A small valid document of each kind that `fastdiff report` reads."""

MACHINE = {"cpu": "AMD EPYC", "cores": 2, "threads": 2, "memory_bytes": 1, "gpu": None}
VERSIONS = {"fastdiff": "0.1.0", "torch": "2.13.0+cpu", "triton": "3.9.0"}
FACTS = {"machine": MACHINE, "versions": VERSIONS, "commit": "abc1234", "command": "fastdiff"}


def bench_row(backend, samples, **more):
    row = {
        "case": "demo, float32",
        "backend": backend,
        "receipt": {"passed": True},
        "samples_ms": samples,
        "image_samples_ms": [2 * sample for sample in samples],
        "peak_mem_bytes": 1000,
    }
    return row | more


BENCH = FACTS | {
    "schema": "fastdiff.bench/1",
    "created": "2026-11-27T00:00:00+00:00",
    "rows": [bench_row("eager", [10.0] * 6), bench_row("fastdiff", [4.0, 5.0, 4.5, 4.2, 4.1, 4.3])],
}
COUNTS = FACTS | {
    "schema": "fastdiff.counts/1",
    "case": "demo, float32",
    "rows": [
        {
            "backend": backend,
            "counts": {
                "step": {
                    "conv": {"launches": 3, "bytes": 100, "flops": 7},
                    "host read": {"launches": 2, "bytes": 8, "flops": 0},
                },
                "image": {"linear": {"launches": 1, "bytes": 50, "flops": 9}},
            },
            "drawn": {
                "first": 2,
                "again": 0,
                "other_size": 2,
                "back": 0,
                "compilations": 0,
                "peak_bytes": 1234,
            },
        }
        for backend in ("eager", "fastdiff")
    ],
}
STATIC = FACTS | {
    "schema": "fastdiff.static/1",
    "rows": [
        {
            "op": "attention",
            "kernel": "_attention_kernel",
            "case": "sd15-64-self",
            "dtype": "float16",
            "arch": 90,
            "registers": 168,
            "spills": 0,
            "shared": 65536,
            "occupancy": 0.25,
            "load": 16,
            "store": 16,
            "narrow": 2,
            "mma": "wgmma",
        }
    ],
}
PAIRED = {
    "schema": "fastdiff.paired/1",
    "case": "demo, float32, cpu",
    "created": "2026-11-27T00:00:00+00:00",
    "machine": MACHINE,
    "command": "fastdiff compare --against main",
    "seconds": 1.0,
    "states": {
        "base": {"name": "main", "commit": "abc1234", "versions": VERSIONS},
        "new": {"name": "working tree", "commit": "abc1234-dirty", "versions": VERSIONS},
    },
    "rows": {"base": ["fastdiff · step"], "new": ["fastdiff · step", "ort · step"]},
    "times": [
        {
            "name": "fastdiff · step",
            "unit": "ms",
            "base": [[5.0, 5.1, 5.2]] * 6,
            "new": [[5.5, 5.6, 5.7]] * 6,
        }
    ],
    "counts": {
        "base": {"fastdiff · step · launches": [165, "launches"]},
        "new": {"fastdiff · step · launches": [166, "launches"]},
    },
    "wrong": {"base": {}, "new": {"channels_last": "its picture is 20 dB from eager's"}},
}
