"""Peak bytes against allocations added up by hand."""

from types import SimpleNamespace

import numpy as np
import torch

from fastdiff.bench.memory import baseline, engine_peak_bytes, peak_bytes

MIB = 2**20
CPU = torch.device("cpu")


def block(mib):
    return torch.empty(mib * MIB, dtype=torch.uint8)


def test_weights_packed_copies_and_the_peak_of_temporaries():
    net = torch.nn.Linear(MIB // 4, 3, bias=False)  # 3 MiB, allocated before the baseline
    pipe = SimpleNamespace(components={"unet": net, "tokenizer": object()}, device=CPU)
    unrelated = block(64)
    before = baseline(CPU)
    packed = block(2)
    views = [packed[: MIB // 2], packed[MIB // 2 :]]  # one storage, counted once

    def draw():
        first = block(10)
        second = block(5)
        del first, second
        block(12)

    assert peak_bytes(pipe, before, draw) == (3 + 2 + 15) * MIB
    assert len(views) == 2
    assert unrelated.numel() == 64 * MIB


def test_an_engines_peak_is_its_own_memory_and_the_weights_it_does_not_replace(tmp_path):
    """Anonymous memory counts; pages mapped from a file do not."""
    pages = tmp_path / "weights"
    pages.write_bytes(bytes(48 * MIB))
    text = torch.nn.Linear(MIB // 4, 8, bias=False)
    replaced = torch.nn.Linear(MIB // 4, 16, bias=False)
    pipe = SimpleNamespace(components={"text": text, "unet": replaced}, device=CPU)
    before = baseline(CPU)
    own = np.ones(30 * MIB, np.uint8)
    mapped = np.memmap(pages, mode="r")
    assert mapped.sum() == 0  # its pages are read

    def draw():
        assert np.ones(20 * MIB, np.uint8).all()

    got = engine_peak_bytes(pipe, before, draw, [replaced])
    assert (8 + 30 + 20 - 1) * MIB < got < (8 + 30 + 20 + 12) * MIB
    assert own.all()
