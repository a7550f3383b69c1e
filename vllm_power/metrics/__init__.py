"""The engine's own figures: what it counts, and how they reach /metrics and the page /power.

The scheduler sees every request of every step with its exact length, once for all ranks, and no dummy batches; so it is
where steps are counted (``steps``). It lives in the engine's process, and what shows the figures in the API's. vLLM has
no way from the one to the other for a plugin: SchedulerStats has no free field, ``collective_rpc`` reaches workers and
waits for the step that is running. So the engine writes into small memory-mapped files, in the format in which
prometheus_client's processes share their metrics (``writer``), in a folder that the first process makes and its
children inherit (``board``); at a scrape an API process adds them up (``reader``). With several API servers vLLM has
such a folder itself: the same files go there, and vLLM's own /metrics reads them.

What that costs: some 20 microseconds of a step with 256 decoding sequences. What it can not do: tell about an engine on
another host; ``engines`` under /v1/power/live says how many are heard.
"""
