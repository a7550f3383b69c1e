"""What was measured: as rows in a file, as a table, as a plot, and the option to paste."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_power.options import PatternOptions
from vllm_power.tools.calibrate.choose import Choice
from vllm_power.tools.common.plots import pyplot, save

Row = dict[str, Any]


def rows(choice: Choice, output_errors: dict[int, float]) -> list[Row]:
    """One row for each layer: those to keep first, in the greedy way's order where it chose them, then by KL alone."""
    proposed = choice.sets[choice.best][0]
    order = {layer: number for number, (layer, _) in enumerate(choice.kept, 1)}
    left = dict(choice.kept)
    by_rank = sorted(
        choice.alone,
        key=lambda layer: (
            layer not in proposed,
            order.get(layer, len(order) + 1),
            -choice.alone[layer].kl,
            layer,
        ),
    )
    return [
        {
            "rank": rank,
            "layer": layer,
            "dense": layer in proposed,
            "output_error": output_errors[layer],
            "kl_alone": choice.alone[layer].kl,
            "agreement_alone": choice.alone[layer].agreement,
            "greedy_step": order.get(layer),
            "kl_left": left[layer].kl if layer in left else None,
        }
        for rank, layer in enumerate(by_rank, 1)
    ]


def summary(choice: Choice) -> Row:
    """The sets that were compared and what each leaves."""
    return {
        "kl_none_dense": choice.none_kept.kl,
        "agreement_none_dense": choice.none_kept.agreement,
        "best": choice.best,
        "sets": {
            way: {"dense_layers": layers, "kl": effect.kl, "agreement": effect.agreement}
            for way, (layers, effect) in choice.sets.items()
        },
    }


def option_line(
    options: PatternOptions,
    stored: PatternOptions | None,
    dense_layers: list[int],
    others: Row | None = None,
) -> str:
    """What to give ``vllm serve``. stored: the options in the checkpoint, if it has any. others: more options."""
    power = {**(others or {}), **options.set_by_user, "dense_layers": dense_layers}
    if stored is not None and stored.effective != PatternOptions(**_of_pattern(power)).effective:
        power["override_checkpoint"] = True
    return f"--additional-config '{json.dumps({'power': power})}'"


def _of_pattern(power: Row) -> Row:
    return {name: value for name, value in power.items() if name in PatternOptions.model_fields}


def show(console: Console, told: Row, layers: list[Row]) -> None:
    table = Table(caption="KL in nats per token, against the dense model, past the pattern's dense range")
    for heading in ("rank", "layer", "", "output error", "KL alone", "best token kept", "KL left"):
        table.add_column(heading, justify="right")
    for row in layers:
        left = row["kl_left"]
        table.add_row(
            str(row["rank"]),
            str(row["layer"]),
            "dense" if row["dense"] else "",
            f"{row['output_error']:.2%}",
            f"{row['kl_alone']:.3g}",
            f"{row['agreement_alone']:.1%}",
            "" if left is None else f"{left:.3g}",
        )
    console.print(table)
    console.print(
        "Output error: of the layer's attention under the pattern, at dense inputs. KL alone: only this layer sparse.\n"
        "KL left: every layer sparse but this one and those the greedy way kept before it.",
        soft_wrap=True,
    )
    compared = Table()
    for heading in ("kept dense", "layers", "KL", "best token kept"):
        compared.add_column(heading)
    compared.add_row("none", "", f"{told['kl_none_dense']:.3g}", f"{told['agreement_none_dense']:.1%}")
    for way, kept in told["sets"].items():
        named = ", ".join(map(str, kept["dense_layers"]))
        mark = " (proposed)" if way == told["best"] else ""
        compared.add_row(way + mark, named, f"{kept['kl']:.3g}", f"{kept['agreement']:.1%}")
    console.print(compared)


def plot(told: Row, layers: list[Row], title: str, path: Path) -> None:
    """Both measures by layer, the proposed layers filled."""
    ordered = sorted(layers, key=lambda row: row["layer"])
    colours = ["tab:blue" if row["dense"] else "lightgrey" for row in ordered]
    names = [str(row["layer"]) for row in ordered]
    figure, panels = pyplot().subplots(2, 1, figsize=(max(7, 0.3 * len(ordered)), 5), sharex=True)
    for axes, field, label in (
        (panels[0], "output_error", "output error"),
        (panels[1], "kl_alone", "KL alone, nats per token"),
    ):
        axes.bar(names, [row[field] for row in ordered], color=colours, edgecolor="grey")
        axes.set_ylabel(label)
        axes.grid(axis="y", alpha=0.3)
    panels[1].set_xlabel("layer (filled: proposed to stay dense)")
    panels[0].set_title(
        f"{title}\nKL with every layer sparse {told['kl_none_dense']:.3g}, "
        f"with the proposed ones dense {told['sets'][told['best']]['kl']:.3g}",
        fontsize="medium",
    )
    save(figure, path)
