"""The report's plots, as SVG to put into a page. The same figures give the same plot."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vllm_power.tools.evals.figures import Accuracy, Agreement, Perplexity

STYLE: Any = {
    "svg.hashsalt": "vllm-power",
    "svg.fonttype": "none",  # words stay words: they can be searched and read aloud
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def heatmap(cells: Sequence[Accuracy]) -> str:
    """Accuracy of one task by length (columns) and depth (rows, the text's start on top)."""
    lengths = sorted({cell.length for cell in cells})
    depths = sorted({cell.depth for cell in cells if cell.depth is not None})
    grid = [[float("nan")] * len(lengths) for _ in depths]
    for cell in cells:
        if cell.depth is not None:
            grid[depths.index(cell.depth)][lengths.index(cell.length)] = cell.accuracy

    with drawing(1.0 + 0.6 * len(lengths), 0.8 + 0.28 * len(depths)) as (_, axes, svg):
        # Drawn cell by cell: an image would be a bitmap inside the SVG.
        axes.pcolormesh(grid, vmin=-0.05, vmax=1.05, cmap="RdYlBu", edgecolors="white", linewidth=1)
        axes.invert_yaxis()
        axes.set_xticks(
            [column + 0.5 for column in range(len(lengths))], [tokens(length) for length in lengths]
        )
        axes.set_yticks([row + 0.5 for row in range(len(depths))], [f"{depth:.0%}" for depth in depths])
        axes.set(xlabel="length, tokens", ylabel="depth")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        for row, values in enumerate(grid):
            for column, value in enumerate(values):
                if value == value:
                    ink = "black" if 0.1 < value < 0.9 else "white"
                    place = {"ha": "center", "va": "center", "color": ink, "fontsize": 9}
                    axes.text(column + 0.5, row + 0.5, f"{100 * value:.0f}", **place)
    return svg()


def by_length(accuracies: Sequence[Accuracy], mean: Sequence[Accuracy] = ()) -> str:
    """Accuracy of each task by length: with its interval, or, where a mean is given, thin lines around that."""
    with drawing(4.2, 3.3) as (_, axes, svg):
        for number, (task, points) in enumerate(grouped(accuracies)):
            lengths = [point.length for point in points]
            style = {"linewidth": 1, "alpha": 0.6} if mean else {}
            marker = "osD^vP*X"[number % 8]
            (line,) = axes.plot(lengths, [p.accuracy for p in points], marker=marker, label=task, **style)
            if not mean:
                low, high = [point.low for point in points], [point.high for point in points]
                axes.fill_between(lengths, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        if mean:
            lengths = [point.length for point in mean]
            axes.plot(lengths, [p.accuracy for p in mean], color="black", linewidth=2.5, label="mean")
        axes.set(ylabel="accuracy", ylim=(-0.03, 1.03))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        length_axis(axes, [point.length for point in accuracies])
        beside = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)} if mean else {"loc": "best"}
        axes.legend(frameon=False, **beside)
    return svg()


def perplexity(perplexities: Sequence[Perplexity], agreements: Sequence[Agreement]) -> str:
    """Perplexity by length, and the dense model's if it was asked."""
    with drawing(4.9, 3.3) as (_, axes, svg):
        if perplexities:
            points = sorted((p.length, p.perplexity) for p in perplexities)
            axes.plot(*zip(*points, strict=True), marker="o", label="this model")
        if agreements:
            ordered = sorted(agreements, key=lambda agreement: agreement.length)
            lengths = [agreement.length for agreement in ordered]
            if not perplexities:
                axes.plot(lengths, [a.perplexity for a in ordered], marker="o", label="this model")
            axes.plot(
                lengths, [a.dense_perplexity for a in ordered], marker="s", ls="--", label="dense model"
            )
            axes.legend(frameon=False)
        axes.set(ylabel="perplexity")
        length_axis(axes, [p.length for p in perplexities] + [a.length for a in agreements])
    return svg()


def by_position(longest: Perplexity) -> str:
    """Perplexity within the windows of one length, by the token's position."""
    with drawing(4.9, 3.3) as (_, axes, svg):
        starts = list(longest.by_position)
        ends = [*starts[1:], longest.length]
        axes.stairs(list(longest.by_position.values()), [starts[0] + 1, *ends], baseline=None, linewidth=2)
        axes.set(ylabel="perplexity", xlabel="position in the window, tokens")
        axes.set_xscale("log", base=2)
        axes.set_xlim(128, None)
        axes.xaxis.set_major_formatter(lambda value, _: tokens(value))
        axes.grid(alpha=0.3)
    return svg()


def agreement(agreements: Sequence[Agreement]) -> str:
    """Agreement with the dense model by length: the same best token, and the divergence."""
    ordered = sorted(agreements, key=lambda agreement: agreement.length)
    lengths = [agreement.length for agreement in ordered]
    with drawing(4.9, 3.3) as (_, axes, svg):
        (top1,) = axes.plot(lengths, [a.top1 for a in ordered], marker="o", label="same best token (left)")
        axes.set(ylabel="share of places", ylim=(0, 1.03))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        length_axis(axes, lengths)
        right = axes.twinx()
        right.spines["right"].set_visible(True)
        (kl,) = right.plot(
            lengths, [a.kl for a in ordered], marker="s", ls="--", color="tab:red", label="divergence (right)"
        )
        right.set(ylabel="divergence, nats", ylim=(0, max(0.01, 1.1 * max(a.kl for a in ordered))))
        axes.legend(handles=[top1, kl], loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    return svg()


def grouped(accuracies: Sequence[Accuracy]) -> list[tuple[str, list[Accuracy]]]:
    """(task, its accuracies by length), in the tasks' order."""
    tasks: dict[str, list[Accuracy]] = {}
    for point in sorted(accuracies, key=lambda point: point.length):
        tasks.setdefault(point.task, []).append(point)
    order = list(dict.fromkeys(point.task for point in accuracies))
    return [(task, tasks[task]) for task in order]


def length_axis(axes: Any, lengths: Sequence[int]) -> None:
    """Lengths on a logarithmic axis, each with its name."""
    ticks = sorted(set(lengths))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [tokens(length) for length in ticks])
    axes.minorticks_off()
    axes.set_xlabel("length, tokens")
    axes.grid(alpha=0.3)


def tokens(count: float) -> str:
    """A token count as people say it: 4K, 1M, 1,500."""
    for factor, name in ((1024**2, "M"), (1024, "K")):
        if count >= factor and count % factor == 0:
            return f"{count / factor:.0f}{name}"
    return f"{count:,.0f}"


@contextmanager
def drawing(width: float, height: float) -> Iterator[tuple[Any, Any, Callable[[], str]]]:
    """A figure of ``width`` by ``height`` inches and its axes; after the block ``svg()`` gives the drawing."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    output = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(width, height))
        try:
            yield figure, axes, lambda: output.getvalue()[output.getvalue().index("<svg") :]
            figure.savefig(output, format="svg", metadata={"Date": None}, bbox_inches="tight")
        finally:
            plt.close(figure)
