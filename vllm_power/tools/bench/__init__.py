"""Benchmarks on random data: medians, and ratios to the best peer in the same run."""
