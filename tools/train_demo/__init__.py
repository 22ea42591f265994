"""Trains the weights of ``fastdiff.demo`` again: ``python -m tools.train_demo --help``."""
