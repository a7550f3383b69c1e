"""Heatmaps of layer by block, one per model and pattern (paper, section 4.6)."""

from pathlib import Path
from typing import Any

from vllm_power.tools.common.plots import pyplot, save
from vllm_power.tools.common.results import Row


def heatmaps(rows: list[Row]) -> dict[tuple[str, str], dict[int, Row]]:
    """{(model, pattern): {layer: row}} of the last run of each; the rows of a run start with layer 0."""
    found: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        key = row["model"], row["pattern"]
        if row["layer"] == 0:
            found[key] = {}
        found[key][row["layer"]] = row
    return found


def plot(rows: list[Row], path: Path) -> Path:
    """Draw all heatmaps on one scale, with a line around the blocks that the key can reach under the pattern."""
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
        # Shorter distances have no room for a label.
        distances = [0, *(power for power in powers if 16 * power >= blocks)]
        axes.set_xticks(
            [key + distance for distance in distances], [f"+{distance}" for distance in distances]
        )
        axes.set(
            xlabel=f"distance from the key's block, in blocks of {row['block_size']} tokens",
            ylabel="layer",
            title=f"{model} under {pattern}",
        )
        figure.colorbar(shown, ax=axes, label="probe accuracy, %")
    return save(figure, path)


def outline(axes: Any, reached: list[set[int]], blocks: int) -> None:
    """Draw a line between cells that the key can reach and cells that it cannot."""
    for layer, here in enumerate(reached):
        above = reached[layer + 1] if layer + 1 < len(reached) else here
        for block in range(blocks):
            if (block in here) != (block in above):
                axes.plot([block - 0.5, block + 0.5], [layer + 0.5] * 2, color="white", linewidth=1)
            if block + 1 < blocks and (block in here) != (block + 1 in here):
                axes.plot([block + 0.5] * 2, [layer - 0.5, layer + 0.5], color="white", linewidth=1)
