"""The engine's own metrics: what it counts, and how the counts reach /metrics and the page /power.

Steps are counted in the scheduler (``scheduler``), because it sees the exact length of every request in every step,
once for all ranks and without dummy batches. The scheduler runs in the engine's process, but an API process shows the
metrics. vLLM offers plugins no channel between the two: SchedulerStats has no free field, and ``collective_rpc``
reaches only workers and waits for the running step. Therefore the engine writes into small memory-mapped files, in the
format in which prometheus_client shares metrics between processes (``writer``). The files are in a folder that the
first process creates and its children inherit (``shared_dir``). At each scrape, an API process adds the files up
(``collector``). With several API servers, vLLM has such a folder itself: the files go there, and vLLM's own /metrics
reads them.

Counting costs about 20 microseconds per step with 256 decoding sequences. It cannot include an engine on another host;
``engines`` in /v1/power/live is the number of engines that are included.
"""
