"""The server room: the page /power, its JSON under /v1/power, and what `vllm-power explore` serves without an engine.

Nothing on the engine's path imports it. vLLM loads it as an endpoint plugin, in the API process, where VLLM_PLUGINS
names it.
"""
