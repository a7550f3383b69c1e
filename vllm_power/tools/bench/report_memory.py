"""The table and the plot of ``memory.jsonl``: the gain and the cost of KV reclamation."""

from pathlib import Path
from typing import Any

from vllm_power.lifetimes import lifetimes
from vllm_power.pattern import POWER
from vllm_power.tools.common.plots import pyplot, save
from vllm_power.tools.common.results import Row, last_run, rows, run_of, where

BENCHES = (
    "live",
    "concurrency",
    "second_turn",
    "chats",
    "tier",
    "throughput",
    "offloading",
    "scheduler_step",
)
OFF, ON, DENSE = "power_no_reclaim", "power", "dense"


def table(measured: list[Row]) -> str:
    """A table per machine, with its last run of each bench: reclamation off and on."""
    tables: dict[tuple[str, ...], list[Row]] = {}
    for bench in BENCHES:
        if found := [row for row in measured if row["bench"] == bench]:
            found = last_run(found)
            tables.setdefault(run_of(found[-1]), []).extend(found)
    head = "| | context | output | FLASH_ATTN | power, reclamation off | on | |\n" + "| --- " * 7 + "|\n"
    return "\n".join(f"{where(run[-1])}\n\n{head}{_lines(run)}" for run in tables.values())


def _lines(run: list[Row]) -> str:
    works: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in run:  # the last row wins if two measure the same
        works.setdefault(_work(row), {})[row["impl"]] = row
    lines = [line for (bench, *_), impls in works.items() for line in LINES[bench](impls)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _work(row: Row) -> tuple[Any, ...]:
    """The case that a row measures, without the implementation."""
    keys = (
        "bench",
        "context",
        "output",
        "cache_sequences",
        "cache_pages",
        "requests",
        "work",
        "prefix_caching",
        "resident_blocks",
    )
    return tuple(row.get(key) for key in keys)


def _live(impls: dict[str, Row]) -> list[list[str]]:
    on, off = impls[ON], impls[OFF]
    lines = []
    for what, blocks in (("prompt done", _after_prompt), ("at the peak", _at_peak)):
        first, second = blocks(off), blocks(on)
        share = f"{100 * second / first:.1f}%"
        lines.append(_line(f"blocks held, {what}", on, "", f"{first:g}", f"{second:g}", share))
    return lines


def held_blocks(measured: list[Row]) -> tuple[str, str, str]:
    """Blocks held after the prompt's prefill, with reclamation off and on, and their ratio, from rows of bench live."""
    rows_of = {row["impl"]: row for row in measured}
    first, second = _after_prompt(rows_of[OFF]), _after_prompt(rows_of[ON])
    return f"{first:g}", f"{second:g}", f"{100 * second / first:.1f}%"


def _after_prompt(row: Row) -> float:
    return round(row["value"] / 100 * row["blocks"], 1)


def _at_peak(row: Row) -> float:
    return float(row["peak_blocks"])


def _concurrency(impls: dict[str, Row]) -> list[list[str]]:
    on, off = impls[ON], impls[OFF]
    what = f"sequences in decode at once, in {on['cache_pages']:,} pages of {on['page']}"
    return [_line(what, on, "", f"{off['value']}", f"{on['value']}", f"{on['value'] / off['value']:.1f}x")]


def _second_turn(impls: dict[str, Row]) -> list[list[str]]:
    on, off = impls[ON], impls[OFF]
    what = (
        f"cached tokens of a chat's second turn after another chat, {on['cache_pages']} pages of {on['page']}"
    )
    return [_line(what, on, "", f"{off['value']:,}", f"{on['value']:,}", "")]


def _chats(impls: dict[str, Row]) -> list[list[str]]:
    on, off = impls[ON], impls[OFF]
    what = f"{on['users']} users, {on['turns']} turns each, cache of {on['cache_sequences']} whole chats: "
    return [
        _line(
            what + "cached share of the prompts", on, "", f"{off['value']:.0f}%", f"{on['value']:.0f}%", ""
        ),
        _line(
            what + "users in decode at once", on, "", *(f"{row['decoding_at_once']}" for row in (off, on)), ""
        ),
    ]


def _tier(impls: dict[str, Row]) -> list[list[str]]:
    on = impls[ON]
    what = (
        f"host tier, {on['work']}: blocks that return per block of tokens, {on['resident_blocks']} resident"
    )
    fewer = (
        f"{100 * (1 - on['value'] / on['by_last_use']):.0f}% fewer than by last use ({on['by_last_use']:.2f})"
    )
    return [_line(what, on, "", "", f"{on['value']:.2f}", fewer)]


def _throughput(impls: dict[str, Row]) -> list[list[str]]:
    """The gain has two factors: off / FLASH_ATTN is faster attention, on / off is more sequences at once."""
    on = impls[ON]
    what = f"tokens/s, {on['requests']} requests, cache of {on['cache_sequences']} sequences"
    values = [impls[impl]["value"] if impl in impls else None for impl in (DENSE, OFF, ON)]
    cells = ["" if value is None else f"{value:,.0f}" for value in values]
    dense, off, ours = values
    gain = ""
    if dense and off:
        gain = f"{ours / dense:.2f}x = {off / dense:.2f}x attention, {ours / off:.2f}x more sequences"
    return [_line(what, on, *cells, gain)]


def _offloading(impls: dict[str, Row]) -> list[list[str]]:
    """The gain of host memory is the ratio to the first turn, whose tokens are all computed."""
    on = impls[ON]
    lines = []
    for what, key in (("all computed", "computed"), ("from host memory", "value")):
        cells = [f"{impls[impl][key]:.2f}" if impl in impls else "" for impl in (DENSE, OFF, ON)]
        gain = f"{on['computed'] / on['value']:.1f}x" if key == "value" else ""
        lines.append(_line(f"s to the first token, {what}", on, *cells, gain))
    return lines


def _scheduler_step(impls: dict[str, Row]) -> list[list[str]]:
    on, dense = impls[ON], impls[DENSE]
    caching = "with" if on["prefix_caching"] else "without"
    what = f"scheduler ms per step, {on['batch']} sequences, {on['work']}, {caching} prefix caching"
    change = 100 * (on["value"] / dense["value"] - 1)
    return [_line(what, on, f"{dense['value']:.3f}", "", f"{on['value']:.3f}", f"{change:+.1f}%")]


def _line(what: str, row: Row, *cells: str) -> list[str]:
    return [what, f"{row['context']:,}", f"{row['output']:,}", *cells]


LINES = {
    "live": _live,
    "concurrency": _concurrency,
    "second_turn": _second_turn,
    "chats": _chats,
    "tier": _tier,
    "throughput": _throughput,
    "offloading": _offloading,
    "scheduler_step": _scheduler_step,
}


def plot(folder: Path) -> Path:
    """Draw the measured and the computed blocks over time, and the sequences at once, into memory.svg."""
    measured = rows(folder, "memory")
    figure, (curve, bars) = pyplot().subplots(1, 2, figsize=(12, 4), width_ratios=(3, 2))
    _plot_live(curve, last_run([row for row in measured if row["bench"] == "live"]))
    _plot_concurrency(bars, last_run([row for row in measured if row["bench"] == "concurrency"]))
    return save(figure, folder / "memory.svg")


def _plot_live(axes: Any, measured: list[Row]) -> None:
    row = measured[-1]
    lives = lifetimes(POWER, (row["context"] + row["output"] - 2) // POWER.block_size)
    tokens = [q * POWER.block_size for q in range(lives.last + 1)]
    for impl, label, style in ((OFF, "held, reclamation off", "--"), (ON, "held, reclamation on", ".")):
        points = next(row["points"] for row in reversed(measured) if row["impl"] == impl)
        axes.plot(*zip(*points, strict=True), style, markersize=3, label=label)
    axes.plot(tokens, lives.live, linewidth=1, label="still needed (computed)")
    axes.set(
        xlabel="tokens computed or in flight",
        ylabel=f"blocks of {POWER.block_size} tokens",
        title=f"one request, {row['context']:,} tokens in, {row['output']:,} out, chunks of {row['chunk']:,}",
    )
    axes.grid(alpha=0.3)
    axes.legend()


def _plot_concurrency(axes: Any, measured: list[Row]) -> None:
    contexts = sorted({row["context"] for row in measured})
    for shift, impl, label in ((-0.2, OFF, "reclamation off"), (0.2, ON, "on")):
        values = {row["context"]: row["value"] for row in measured if row["impl"] == impl}
        places = [number + shift for number in range(len(contexts))]
        axes.bar_label(axes.bar(places, [values[c] for c in contexts], 0.4, label=label))
    axes.set_xticks(range(len(contexts)), [f"{context:,} tokens in" for context in contexts])
    axes.margins(y=0.12)
    axes.set(
        ylabel="sequences in decode at once",
        title=f"a cache of {measured[-1]['cache_sequences']} whole sequences, "
        f"{measured[-1]['output']:,} tokens out",
    )
    axes.legend(loc="upper left")
