"""The engine's count of its steps, against the pattern's definition, in vLLM's own scheduler."""

import itertools
import random
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.shown import STAGE, figures
from vllm.platforms import current_platform

from vllm_power import compat
from vllm_power.metrics import definitions, scheduler, shared_dir
from vllm_power.pattern import Pattern, RowRule, preset
from vllm_power.scheduler import PowerScheduler
from vllm_power.tools.bench.engine import IMPLS
from vllm_power.tools.bench.scheduler_alone import SchedulerAlone, configuration

SETTINGS = {"max_model_len": 8192, "max_num_batched_tokens": 1024, "max_num_seqs": 8}


def run(alone: SchedulerAlone, requests: int) -> Iterator[Any]:
    """Serve random requests to their end, some with the same beginning; yields what vLLM scheduled in each step."""
    numbers = random.Random(7)
    shared = numbers.choices(range(4, 1000), k=2000)
    for _ in range(requests):
        own = numbers.choices(range(4, 1000), k=numbers.choice([1, 255, 256, 257, 700, 3000]))
        alone.add(numbers.choice([shared, []]) + own, numbers.choice([1, 2, 300, 600]))
    scheduled = []
    original = alone.vllm.schedule
    alone.vllm.schedule = lambda: scheduled.append(original()) or scheduled[-1]
    while alone.vllm.requests:
        alone.step()
        yield scheduled[-1]


def held(alone: SchedulerAlone) -> int:
    """The pages in some request's table, those of a shared prefix once."""
    (manager,) = alone.vllm.kv_cache_manager.coordinator.single_type_managers
    tables = manager.req_to_blocks.values()
    return len({page.block_id for table in tables for page in table if not page.is_null})


def by_the_definition(step: Any, pattern: Pattern) -> tuple[int, int, int]:
    """Tokens of a step, key blocks that its query blocks read and skip: token by token and pair by pair."""
    starts = dict(
        zip(step.scheduled_cached_reqs.req_ids, step.scheduled_cached_reqs.num_computed_tokens, strict=True)
    )
    starts |= {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
    tokens = read = skipped = 0
    for request, number in step.num_scheduled_tokens.items():
        tokens += number
        for q in {
            position // pattern.block_size for position in range(starts[request], starts[request] + number)
        }:
            seen = sum(pattern.sees(q, k) for k in range(q + 1))
            read, skipped = read + seen, skipped + q + 1 - seen
    return tokens, read, skipped


@pytest.mark.parametrize("pages", [500, 24], ids=["room for all", "preemptions"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reclaim": False},
        {"pattern": "longnet"},
        {"pattern": "full"},
        {"block_size": 512, "window_blocks": 2},
    ],
    ids=str,
)
def test_every_step_counts(
    engine: Callable[..., SchedulerAlone], options: dict[str, Any], pages: int
) -> None:
    alone = engine(pages, options, **SETTINGS)
    fields = {field: options[field] for field in ("block_size", "window_blocks") if field in options}
    pattern = preset(options.get("pattern", "power"), **fields)
    tokens = read = skipped = run_steps = 0
    for step in run(alone, requests=12):
        some, more_read, more_skipped = by_the_definition(step, pattern)
        tokens, read, skipped = tokens + some, read + more_read, skipped + more_skipped
        run_steps += some > 0
        shown = figures()
        assert shown["sequences_running"] == len(alone.vllm.running)
        assert shown["kv_blocks_live"] == held(alone)
    assert (shown["tokens_total"], shown["blocks_read_total"], shown["blocks_skipped_total"]) == (
        tokens,
        read,
        skipped,
    )
    executions = {kind: shown[f"layer_executions_total.{kind}"] for kind in STAGE["layers"]}
    assert executions == {"sparse": 3 * run_steps, "dense": run_steps, "sliding_window": 0}
    reclaims = options.get("reclaim", True) and pattern.name != "full"
    assert (shown["kv_blocks_reclaimed_total"] > 0) == reclaims == shown["reclamation_enabled"]
    assert shown["reclamation_requested"] == options.get("reclaim", True)
    assert (shown["sequences_running"], shown["kv_blocks_live"]) == (0, 0)
    assert shown["kv_blocks_capacity"] == pages - 1
    assert (alone.preemptions > 0) == (pages < 100)
    assert shown["counting"] == 1


def test_dense_rows_are_counted_with_all_that_they_read(engine: Callable[..., SchedulerAlone]) -> None:
    """Two prompts in chunks of 1,024, then five tokens each: against the rule, row by row."""
    alone = engine(500, {"mode": "training_free", "dense_layers": []}, **SETTINGS)
    lengths, rule, pattern = (3000, 2050), RowRule(128, True), preset("power")
    for length in lengths:
        alone.add([length % 1000] * length, 5)
        while alone.vllm.requests:
            alone.step()
    dense_rows = read = causal = 0
    for length in lengths:
        chunks = [*range(0, length, 1024), *range(length, length + 5)]
        for start, end in itertools.pairwise(chunks):
            rows = range(start, end)
            dense_rows += sum(rule.sees_everything(row, length) for row in rows)
            for block in {row // 256 for row in rows}:
                is_dense = any(rule.sees_everything(row, length) for row in rows if row // 256 == block)
                read += block + 1 if is_dense else len(pattern.visible_blocks(block))
                causal += block + 1
    shown = figures()
    assert shown["dense_rows_total"] == dense_rows == 2 * (128 + 4)
    assert (shown["blocks_read_total"], shown["blocks_skipped_total"]) == (read, causal - read)
    assert shown["counting"] == 1


def test_what_is_computed_again_counts_again(engine: Callable[..., SchedulerAlone]) -> None:
    """Tokens of a cached prefix are not computed, so not counted; those of a preempted sequence are, twice."""
    alone = engine(500, **SETTINGS)
    alone.add(list(range(4, 604)), 1)
    alone.step()
    assert figures()["tokens_total"] == 600
    alone.add(list(range(4, 604)), 1)
    alone.step()
    assert figures()["tokens_total"] == 600 + 600 - 512


def test_figures_wait_while_sequences_run_and_are_exact_after(
    engine: Callable[..., SchedulerAlone], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = engine(500, **SETTINGS)
    monkeypatch.setattr(scheduler, "SECONDS", 3600)
    alone.add([5] * 100, 20)
    alone.step()
    first = figures()
    assert (first["tokens_total"], first["sequences_running"]) == (100, 1)
    alone.step()
    assert figures() == first
    while alone.vllm.requests:
        alone.step()
    last = figures()
    assert (last["tokens_total"], last["sequences_running"], last["kv_blocks_live"]) == (119, 0, 0)


def test_serving_goes_on_when_counting_fails(
    engine: Callable[..., SchedulerAlone], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = engine(500, **SETTINGS)
    alone.add([5] * 100, 20)
    alone.step()
    before = figures()
    assert before["counting"] == 1
    monkeypatch.setattr(alone.vllm.power_steps, "visible", [])
    while alone.vllm.requests:
        alone.step()
    after = figures()
    assert after["counting"] == 0
    assert after["tokens_total"] == before["tokens_total"], "it stops at once, and does not count in part"


def test_serving_goes_on_without_a_folder(
    engine: Callable[..., SchedulerAlone], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_dir, "metrics_folder", lambda: None)
    alone = engine(500, **SETTINGS)
    assert alone.vllm.power_steps is None
    alone.add([5] * 100, 3)
    while alone.vllm.requests:
        alone.step()


def test_workers_that_are_not_heard(
    engine: Callable[..., SchedulerAlone], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their layers are unknown and not counted: no zeros in their place."""
    monkeypatch.setattr(shared_dir, "notes", lambda prefix: {})
    alone = engine(500, **SETTINGS)
    alone.add([5] * 100, 3)
    alone.step()
    shown = figures()
    assert shown["tokens_total"] == 100
    assert not any(name.startswith(("layer_executions", "layers.")) for name in shown)


def test_a_model_without_a_layer_for_it_is_refused_whatever_its_stages(
    engine: Callable[..., SchedulerAlone], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker of a pipeline sees its own stage alone, and must let one without a sparse layer pass."""
    windows = {"sparse": [], "dense": [], "sliding_window": [0, 1]}
    note = {"layers": windows, "executor": None, "page_size": 256, "reclamation": "on"}
    monkeypatch.setattr(shared_dir, "notes", lambda prefix: {"stage-0-0": note})
    with pytest.raises(ValueError, match="none of the 2 attention layers"):
        engine(500, **SETTINGS)


def test_reclamation_is_on_where_a_cache_reclaims(engine: Callable[..., SchedulerAlone]) -> None:
    """Not where the workers only say so."""
    told = []
    for options in ({}, {"reclaim": False}):
        name = shared_dir.engine_name(engine(500, options, **SETTINGS).vllm.vllm_config)
        told.append(shared_dir.notes("engine-")[f"engine-{name}"]["reclamation"])
    assert told[0] == "on"
    assert "no layer has" in told[1]


def test_a_schedulers_class_is_wrapped_once(engine: Callable[..., SchedulerAlone]) -> None:
    config = engine(500, **SETTINGS).vllm.vllm_config
    first = config.scheduler_config.get_scheduler_cls()
    compat.extend_scheduler(config, scheduler.CountedScheduler)
    assert config.scheduler_config.get_scheduler_cls() is first
    assert first.__mro__[1] is scheduler.CountedScheduler
    assert first.__mro__[2].__module__.startswith("vllm.v1.core.sched")


def test_a_decode_step_is_counted_in_no_time(engine: Callable[..., SchedulerAlone]) -> None:
    """256 sequences: about 20 microseconds on an idle core; vLLM's scheduler takes a millisecond or more."""
    alone = engine(2000, **SETTINGS | {"max_num_seqs": 256, "max_num_batched_tokens": 8192})
    for number in range(256):
        alone.add([number] * 20, 100)
    while alone.decoding < 256:
        alone.step()
    step = alone.vllm.schedule()
    assert step.total_num_scheduled_tokens == 256
    seconds = min(timeit.repeat(lambda: alone.vllm.power_steps.count(step, {}), number=50, repeat=20)) / 50
    assert seconds < 200e-6


def test_names_are_those_that_are_written(engine: Callable[..., SchedulerAlone]) -> None:
    engine(500, **SETTINGS)
    written = {name.split(".")[0] for name in figures()}
    assert written == {figure.name.removeprefix("vllm_power_") for figure in definitions.ALL}


@pytest.mark.parametrize("counts", [True, False], ids=["power", "another backend"])
def test_only_an_engine_with_the_backend_counts(counts: bool, folder: Path) -> None:
    """By the hook that vLLM calls in the engine's process before it makes a scheduler."""
    with configuration(IMPLS["power"] if counts else {}, **SETTINGS) as config:
        current_platform.register_custom_kv_cache_specs(config)
        found = config.scheduler_config.get_scheduler_cls()
        assert issubclass(found, scheduler.CountedScheduler) == counts
        assert issubclass(found, PowerScheduler) == counts
