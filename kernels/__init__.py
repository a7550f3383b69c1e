"""Attention over a rewritten block table: the plan, the kernels and their oracle. Knows torch and Triton, never vLLM."""
