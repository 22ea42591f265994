"""Fused kernels, one folder each: `spec.py` (the contract), `cpu.py`, `gpu.py`, and the manual."""
