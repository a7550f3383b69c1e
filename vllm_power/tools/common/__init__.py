"""Shared by several tools: results, plots, a vLLM server, progress, command-line options."""
