"""Executors: each runs ordinary causal paged attention over the same plan, on its own kernels."""
