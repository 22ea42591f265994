"""Fused kernels, one folder each: `spec.py` contract, `cpu.py`, `gpu.py`, and the manual."""
