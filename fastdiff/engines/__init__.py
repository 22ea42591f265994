"""Networks that another runtime computes: files that `fastdiff export` wrote, run in a pipeline."""
