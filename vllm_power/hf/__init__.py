"""Train and evaluate under a pattern, with transformers. Nothing here is needed to serve."""
