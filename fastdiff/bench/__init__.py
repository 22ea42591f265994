"""Honest steps per second: backends side by side in one process, each behind a receipt.

`run.bench` is the whole of it: it draws the same picture with every backend, checks the picture
and one U-Net step against float64, and only then times, interleaved in random order.
"""
