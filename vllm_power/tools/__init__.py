"""Tools around the engine: command line, benchmarks, evaluation, training. Nothing in the engine imports them."""
