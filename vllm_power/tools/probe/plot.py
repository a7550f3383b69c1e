"""Heatmaps layer x block, after the paper's section 4.6: one for each model and pattern."""

from pathlib import Path
from typing import Any

from vllm_power.tools.common.plots import pyplot, save
from vllm_power.tools.common.results import Row


def heatmaps(rows: list[Row]) -> dict[tuple[str, str], dict[int, Row]]:
    """{(model, pattern): {layer: row}}, of the last run each; a run's rows begin with layer 0."""
    found: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        key = row["model"], row["pattern"]
        if row["layer"] == 0:
            found[key] = {}
        found[key][row["layer"]] = row
    return found


def plot(rows: list[Row], path: Path) -> Path:
    """Draw all of them, one below the other, on one scale. A line runs around what the pattern lets the key reach."""
    maps = heatmaps(rows)
    figure, grid = pyplot().subplots(len(maps), 1, figsize=(9, 2.9 * len(maps)), squeeze=False)
    for axes, ((model, pattern), layers) in zip(grid[:, 0], maps.items(), strict=True):
        row = layers[max(layers)]
        key, blocks = row["key_block"], row["blocks"]
        shown = axes.imshow(
            [[100 * share for share in layers[layer]["accuracy"]] for layer in sorted(layers)],
            origin="lower",
            aspect="auto",
            vmin=100 / row["keys"],
            vmax=100,
        )
        outline(axes, [set(layers[layer]["reached"]) for layer in sorted(layers)], blocks)
        powers = (1 << power for power in range((blocks - 1 - key).bit_length()))
        distances = [
            0,
            *(power for power in powers if 16 * power >= blocks),
        ]  # the others have no room for a label
        axes.set_xticks(
            [key + distance for distance in distances], [f"+{distance}" for distance in distances]
        )
        axes.set(
            xlabel=f"distance from the key's block, in blocks of {row['block_size']} tokens",
            ylabel="layers passed",
            title=f"{model} under {pattern}",
        )
        figure.colorbar(shown, ax=axes, label="key told, %")
    return save(figure, path)


def outline(axes: Any, reached: list[set[int]], blocks: int) -> None:
    """A line between cells where one can know the key and the other can not."""
    for layer, here in enumerate(reached):
        above = reached[layer + 1] if layer + 1 < len(reached) else here
        for block in range(blocks):
            if (block in here) != (block in above):
                axes.plot([block - 0.5, block + 0.5], [layer + 0.5] * 2, color="white", linewidth=1)
            if block + 1 < blocks and (block in here) != (block + 1 in here):
                axes.plot([block + 0.5] * 2, [layer - 0.5, layer + 0.5], color="white", linewidth=1)
