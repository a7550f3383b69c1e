"""Counts an engine's steps in its scheduler: tokens, blocks read and skipped, layers run, blocks held and reclaimed.

In each step, the new tokens of a request that lie in one query block read the visible key blocks of that block: one
segment of the plan. So a prompt counts a query block once per chunk that touches it, and a decoding sequence counts one
query block per step. The lengths come from the scheduler and are exact, with one exception: with asynchronous
scheduling and speculative decoding they still include drafts that are rejected later. While sequences run, the metrics
are written every tenth of a second; when no sequence runs any more, they are written at once.
"""

import time
from importlib.metadata import version
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_power import options, refusals
from vllm_power.dense_requests import is_dense
from vllm_power.layers import SPARSE
from vllm_power.metrics import definitions, shared_dir, stages, writer
from vllm_power.metrics.definitions import Metric
from vllm_power.pattern import EVERY_ROW

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

logger = init_logger("vllm.power")

# The maximum age of the metrics while sequences run: steps of a few milliseconds need not write every time.
SECONDS = 0.1


class CountedScheduler:
    """A base in front of vLLM's scheduler class, whichever is in use (``compat.extend_scheduler``)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.power_steps: StepCounter | None = None
        try:
            self.power_steps = StepCounter(self.vllm_config, self)  # type: ignore[attr-defined]
        except Exception as error:
            logger.warning(
                "PowerAttention: no metrics are available, because the engine cannot count its steps: %r",
                error,
            )
        # A single pipeline stage may have no layer that runs the pattern; here all stages are known.
        if self.power_steps is not None and self.power_steps.layers is not None:
            numbers = {kind: len(indices) for kind, indices in self.power_steps.layers.items()}
            refusals.check_any_layer(numbers[SPARSE], sum(numbers.values()))

    def update_from_output(self, scheduler_output: "SchedulerOutput", *args: Any, **kwargs: Any) -> Any:
        counter = self.power_steps
        prompts = {} if counter is None else counter.prompts(scheduler_output)
        outputs = super().update_from_output(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        if counter is not None:
            counter.count(scheduler_output, prompts)
        return outputs


class StepCounter:
    """The metrics of one engine. Raises OSError if they cannot be written."""

    def __init__(self, vllm_config: "VllmConfig", scheduler: Any) -> None:
        self.scheduler, self.pool = scheduler, scheduler.kv_cache_manager.block_pool
        self.engine = shared_dir.engine_name(vllm_config)
        self.labels = writer.common_labels(vllm_config)
        asked = options.of_config(vllm_config)
        pattern, max_model_len = asked.effective_pattern, vllm_config.model_config.max_model_len
        self.shift = pattern.block_size.bit_length() - 1
        self.rule = asked.rows
        self.dense_rows = 0
        # Optimistic lengths can exceed the last block.
        self.visible = pattern.visible_counts(pattern.num_blocks(max_model_len) + 2)
        self.visible_before = [0, *accumulate(self.visible)]

        self.counting = self._value(definitions.COUNTING)  # 0 until everything is set up
        self.steps = self.tokens = self.read = self.skipped = 0
        self.due = 0.0  # when to write the metrics again
        self.values = {
            figure: self._value(figure)
            for figure in (
                definitions.TOKENS,
                definitions.DENSE_ROWS,
                definitions.BLOCKS_READ,
                definitions.BLOCKS_SKIPPED,
                definitions.SEQUENCES_RUNNING,
                definitions.KV_BLOCKS_LIVE,
                definitions.KV_BLOCKS_RECLAIMED,
            )
        }
        self._value(definitions.KV_BLOCKS_CAPACITY).set(
            self.pool.num_gpu_blocks - 1
        )  # without the null block
        self._value(definitions.RECLAMATION_REQUESTED).set(asked.reclaim)
        self._value(definitions.REFUSALS, reason=definitions.LOOKS_AHEAD)
        self.managers = [
            manager
            for manager in scheduler.kv_cache_manager.coordinator.single_type_managers
            if hasattr(manager, "num_reclaimed")
        ]
        self._value(definitions.RECLAMATION_ENABLED).set(bool(self.managers))
        self.executions: list[tuple[writer.Value, int]] = []
        self.layers: dict[str, list[int]] | None = None  # of all stages, if they are known
        self._introduce(vllm_config, asked)
        self.counting.set(1)

    def prompts(self, step: "SchedulerOutput") -> dict[str, int]:
        """The prompt length, or ``EVERY_ROW``, of each request in a step.

        It is read before the scheduler drops the requests that end with the step. Empty if no row sees everything,
        because the lengths do not matter then.
        """
        if not self.rule.has_dense_rows:
            return {}
        known = self.scheduler.requests
        return {
            name: EVERY_ROW if is_dense(known[name].sampling_params) else known[name].num_prompt_tokens
            for name in step.num_scheduled_tokens
            if name in known
        }

    def count(self, step: "SchedulerOutput", prompts: dict[str, int]) -> None:
        """Count a step that has run. Raises nothing: after an error, serving continues and the metric COUNTING is 0."""
        if not self.counting.number:
            return
        try:
            self._count(step, prompts)
        except Exception:
            self.counting.set(0)
            logger.exception("PowerAttention: the engine stops counting; serving continues")

    def _count(self, step: "SchedulerOutput", prompts: dict[str, int]) -> None:
        if step.total_num_scheduled_tokens:
            read, causal = self._blocks(step)
            if prompts:
                dense_rows, unread = self._dense_rows(step, prompts)
                self.dense_rows += dense_rows
                read += unread
            self.steps += 1
            self.tokens += step.total_num_scheduled_tokens
            self.read += read
            self.skipped += causal - read
        running, now = len(self.scheduler.running), time.monotonic()
        if not running or now >= self.due:
            self.due = now + SECONDS
            self._write(running)

    def _write(self, running: int) -> None:
        """Publish the counts so far, and the state after this step."""
        shown = {
            definitions.TOKENS: self.tokens,
            definitions.DENSE_ROWS: self.dense_rows,
            definitions.BLOCKS_READ: self.read,
            definitions.BLOCKS_SKIPPED: self.skipped,
            definitions.SEQUENCES_RUNNING: running,
            definitions.KV_BLOCKS_LIVE: self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks(),
            definitions.KV_BLOCKS_RECLAIMED: sum(manager.num_reclaimed for manager in self.managers),
        }
        for figure, number in shown.items():
            self.values[figure].set(number)
        for executions, layers in self.executions:
            executions.set(self.steps * layers)

    def _blocks(self, step: "SchedulerOutput") -> tuple[int, int]:
        """How many key blocks the step's query blocks read, and how many there are up to and including them."""
        cached, shift = step.scheduled_cached_reqs, self.shift
        decodes_only = len(cached.req_ids) == step.total_num_scheduled_tokens
        computed_of: dict[str, int] = {}
        if not decodes_only:
            computed_of = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
            computed_of.update((new.req_id, new.num_computed_tokens) for new in step.scheduled_new_reqs)
        # The block of each request's first new token. Most requests have no other.
        blocks = [
            computed >> shift
            for computed in (cached.num_computed_tokens if decodes_only else computed_of.values())
        ]
        read, causal = sum(map(self.visible.__getitem__, blocks)), sum(blocks) + len(blocks)
        if decodes_only:
            return read, causal
        # The blocks after it, up to the block of the last new token.
        for request, new in step.num_scheduled_tokens.items():
            if new > 1:
                computed = computed_of[request]
                first, end = (computed >> shift) + 1, ((computed + new - 1) >> shift) + 1
                read += self.visible_before[end] - self.visible_before[first]
                causal += (end * (end + 1) - first * (first + 1)) // 2
        return read, causal

    def _dense_rows(self, step: "SchedulerOutput", prompts: dict[str, int]) -> tuple[int, int]:
        """How many rows in the step see everything, and how many blocks they read in addition to the pattern's.

        A query block with such a row reads every block up to itself.
        """
        cached, shift, dense_rows, unread = step.scheduled_cached_reqs, self.shift, 0, 0
        computed_of = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        computed_of.update((new.req_id, new.num_computed_tokens) for new in step.scheduled_new_reqs)
        for name, prompt in prompts.items():
            start, end = self.rule.dense_rows(prompt)
            computed = computed_of[name]
            first, last = max(start, computed), min(end, computed + step.num_scheduled_tokens[name]) - 1
            if first > last:
                continue
            dense_rows += last + 1 - first
            begin, past = first >> shift, (last >> shift) + 1
            unread += (past * (past + 1) - begin * (begin + 1)) // 2
            unread -= self.visible_before[past] - self.visible_before[begin]
        return dense_rows, unread

    def _introduce(self, vllm_config: "VllmConfig", asked: options.PowerOptions) -> None:
        """Publish what runs, from what the workers found in the model that they built (``stages``)."""
        found = stages.whole(vllm_config)
        self.layers = found["layers"]
        for kind, indices in (found["layers"] or {}).items():
            self._value(definitions.LAYERS, attention=kind).set(len(indices))
            self.executions.append((self._value(definitions.LAYER_EXECUTIONS, attention=kind), len(indices)))
        requested = asked.dense_layer_indices(vllm_config.model_config.get_total_num_hidden_layers())
        self._value(definitions.DENSE_LAYERS_REQUESTED).set(len(requested))
        self._value(
            definitions.INFO,
            version=version("vllm-power"),
            pattern=str(asked.effective_pattern),
            executor=found["executor"],
            reclamation="on" if self.managers else "off",
        ).set(1)
        found["max_model_len"] = vllm_config.model_config.max_model_len
        if self.managers:
            found["reclamation"] = "on"
        elif found["reclamation"] == "on":  # the configuration allows it, but the cache decides
            found["reclamation"] = "no layer has a KV cache of the kind that gives blocks back"
        shared_dir.post(f"engine-{self.engine}", found)

    def _value(self, figure: Metric, **labels: str) -> writer.Value:
        return writer.value(figure, self.labels | labels, self.engine)
