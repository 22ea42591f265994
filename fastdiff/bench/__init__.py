"""Steps per second of several backends, in one process, each only with a passed receipt.

`run.bench` draws the same picture with every backend, compares the picture and one step of the
denoising network with float64, and only then times them, interleaved in random order.
"""
