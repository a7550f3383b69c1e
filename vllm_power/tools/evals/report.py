"""The two reports of a run: everything in one JSON file, and a page with plots and tables that needs no network."""

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

from vllm_power.tools.evals import plots
from vllm_power.tools.evals.figures import Figures
from vllm_power.tools.evals.items import Item
from vllm_power.tools.evals.settings import GRIDS
from vllm_power.tools.evals.store import Store

PACKAGES = ("vllm-power", "vllm", "lm_eval", "transformers", "openai")
WRONG_SHOWN = 5  # wrong answers of each task


def write(
    folder: Path,
    about: dict[str, Any],
    figures: Figures,
    items: Iterable[Item],
    store: Store,
    gate: list[str] | None,
) -> tuple[Path, Path]:
    """Write results.json and report.html into the folder and return their paths.

    about: what was measured and how. gate: the lines of what fell; None if no gate was asked for.
    """
    finished = [
        {"key": item.key, "result": result} for item in items if (result := store.result(item)) is not None
    ]
    everything = {
        "about": about | {"date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()},
        "figures": figures.as_dict(),
        "gate": gate,
        "items": finished,
    }
    results = folder / "results.json"
    results.write_text(json.dumps(everything, indent=1) + "\n")
    page = folder / "report.html"
    page.write_text(html(everything, figures))
    return results, page


def html(everything: dict[str, Any], figures: Figures) -> str:
    """The page. Whatever came from the model, the endpoint or the user is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("vllm_power.tools.evals", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "tokens": plots.tokens,
        "percent": lambda share: f"{share:.1%}",
        "figure": lambda value: f"{value:.3f}" if value < 10_000 else f"{value:.3e}",
    }
    return environment.get_template("report.html.j2").render(
        everything,
        lengths=sorted({accuracy.length for accuracy in figures.accuracies}),
        tasks=plots.grouped([*figures.accuracies, *figures.ruler]),
        wrong=wrong_answers(everything["items"]),
        drawn={name: Markup(svg) for name, svg in drawings(figures).items()},
        maps=[
            (task, Markup(plots.heatmap(list(cells))))
            for task, cells in groupby(figures.cells, key=lambda cell: cell.task)
        ],
    )


def drawings(figures: Figures) -> dict[str, str]:
    """{name: SVG} of the plots that there is something for."""
    drawn = {}
    grids = [point for point in figures.accuracies if point.task in GRIDS]
    families = [point for point in figures.accuracies if point.task not in GRIDS]
    if grids:
        drawn["grids"] = plots.by_length(grids)
    if families:
        drawn["ruler"] = plots.by_length(families, figures.ruler)
    if figures.perplexities or figures.agreements:
        drawn["perplexity"] = plots.perplexity(figures.perplexities, figures.agreements)
    if figures.perplexities:
        longest = max(figures.perplexities, key=lambda perplexity: perplexity.length)
        drawn["by_position"] = plots.by_position(longest)
    if figures.agreements:
        drawn["agreement"] = plots.agreement(figures.agreements)
    return drawn


def wrong_answers(finished: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first answers of each task that were not wholly right."""
    shown: dict[str, list[dict[str, Any]]] = {}
    for item in finished:
        if item["result"].get("score", 1) < 1:
            shown.setdefault(item["key"]["task"], []).append(item)
    return [item for items in shown.values() for item in items[:WRONG_SHOWN]]


def versions() -> dict[str, str]:
    """{package: version} of what took part on this side and is installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
