"""Attention over a rewritten block table: plan, kernels and oracle. Knows torch and Triton, never vLLM."""
