"""Runs files that `fastdiff export` wrote in another runtime, inside a pipeline."""
