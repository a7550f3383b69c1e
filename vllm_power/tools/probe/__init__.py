"""Linear probes of hidden states: how far, and by which layers, a sentence is known (paper, section 4.6)."""
