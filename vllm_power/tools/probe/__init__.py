"""Linear probes of hidden states: which blocks carry a key, layer by layer (paper, section 4.6)."""
