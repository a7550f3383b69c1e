"""Tools around the engine: command line, benchmarks, evaluation, training. The engine never imports them."""
