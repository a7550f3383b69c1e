"""PowerAttention as a vLLM attention backend: ``vllm serve MODEL --attention-backend power``.

Importing this package imports neither torch nor vLLM. The plugin imports them when vLLM loads it.
"""
