"""PowerAttention as a vLLM attention backend: ``vllm serve MODEL --attention-backend power``.

Importing this package imports neither torch nor vLLM; the plugin does, when vLLM asks for it.
"""
