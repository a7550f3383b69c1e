"""What a served model can still recall: passkeys, needles, RULER, perplexity and agreement with the dense model."""
