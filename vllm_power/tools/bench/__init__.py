"""Benchmarks: ratios against the best peer in the same run, medians, on random data."""
