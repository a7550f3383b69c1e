"""The sweep: every text-generating architecture of vLLM's registry, tiny and random, served dense and with power.

``python -m sweep`` (in ``tests/``, or ``make sweep``) tries each in a process of its own and files what came of it;
docs/models.md is made from that.
"""
