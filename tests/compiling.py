"""Runs programs that compile fastdiff's GPU kernels. The tests' own process cannot: its kernels run
in Triton's interpreter. Each program is a fork of one process that has imported torch already."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from command import copied

BEGIN = """
import dataclasses
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from fastdiff import cli, compiler, families
from fastdiff.bench import blueprints, specialisations
from fastdiff.compiler import own_size
from fastdiff.kernels import inspect, pool, shipped
"""
TABLE = """
archs, dtype, narrowed = json.loads(sys.argv[1])
rows = inspect.table(archs, [getattr(torch, dtype)], **narrowed)
rows = [dataclasses.asdict(row) | {"fits": row.fits, "faults": row.faults} for row in rows]
json.dump(rows, sys.stdout)
"""


@pytest.fixture(scope="session")
def compiling(tmp_path_factory):
    """compiling(code, *arguments, **variables): what the program prints. `BEGIN` has run before."""
    with copied(BEGIN, tmp_path_factory.mktemp("compiling")) as run:

        def printed(code: str, *arguments: Any, **variables: str) -> str:
            status, out, err = run(code, *map(str, arguments), **variables)
            assert status == 0, err
            return out

        yield printed


@pytest.fixture(scope="session")
def compiled(compiling) -> Callable[..., list[dict[str, Any]]]:
    """compiled(archs, dtype, cases=…, ops=…): `inspect.table`'s rows, with their faults."""

    def rows(archs: Any, dtype: str = "float16", **narrowed: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(
            compiling(TABLE, json.dumps([archs, dtype, narrowed]))
        )
        return found

    return rows
