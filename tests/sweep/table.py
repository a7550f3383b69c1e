"""docs/models.md, made from the results of the sweep."""

from collections import Counter
from typing import Any

from sweep.results import EXACT, NOT_BUILT, REFUSED, RESULTS, WRONG, read

PAGE = RESULTS.parents[1] / "models.md"

MEANING = {
    EXACT: "every log-probability of two prompts, served at once, in chunks and far beyond what every row sees, equals "
    "the explicit mask in float64, and so it does when the prompts come from the prefix cache",
    REFUSED: "the server says at start that the pattern cannot serve the model, and why",
    NOT_BUILT: "vLLM's CPU build cannot run the model with its own dense attention either, or transformers has no tiny "
    "model of it",
    WRONG: "neither",
}

HEAD = """\
# Models

What became of every text-generating architecture in the model registry of vLLM 0.32, each tried as a tiny random model
in float32 on a CPU. `make sweep` makes this page (tests/sweep); do not edit it.

Of multimodal models, the text side is tried (`--language-model-only`). vLLM imports torchvision for most of them, which
`make setup` leaves out on a CPU: install it with
`pip install torchvision==0.28.0+cpu --index-url https://download.pytorch.org/whl/cpu`.
"""

COLUMNS = """
`error` is the largest difference in a log-probability between the engine and the explicit mask, `mask` what the mask
itself changes. `transformers` is the difference between the engine and transformers under the same mask, if
transformers takes a mask. In bfloat16, all three are root mean squares. `page` is vLLM's KV page and `block` the
pattern's block, in tokens. Hybrid models have layers that are not attention; those run as in vLLM.
"""


def page(results: list[dict[str, Any]]) -> str:
    """The whole page."""
    counts = Counter(result["verdict"] for result in results)
    rows = [(verdict, str(counts[verdict]), meaning) for verdict, meaning in MEANING.items()]
    text = HEAD + _table("Results", ("result", "architectures", "meaning"), rows) + COLUMNS
    exact = [result for result in results if result["verdict"] == EXACT]
    text += _table(
        "Exact",
        ("architecture", "attention layers", "page", "block", "error", "mask", "transformers", "remarks"),
        [_exact(result) for result in exact],
    )
    for verdict in (REFUSED, NOT_BUILT, WRONG):
        rows = [
            (f"`{r['architecture']}`", r["why"].replace("|", "\\|"))
            for r in results
            if r["verdict"] == verdict
        ]
        text += _table(verdict.capitalize(), ("architecture", "cause"), rows)
    return text


def _exact(result: dict[str, Any]) -> tuple[str, ...]:
    remarks, by_transformers = [], result.get("transformers")
    if result["hybrid"]:
        remarks.append("hybrid")
    if not result["cached"]:
        remarks.append("without prefix caching")
    if result["dtype"] != "float32":
        remarks.append(result["dtype"])
    if by_transformers is None:
        remarks.append(result["transformers_why"].replace("|", "\\|"))
    return (
        f"`{result['architecture']}`",
        str(result["layers"]),
        str(result["page"]),
        str(result["block"]),
        f"{result['error']:.0e}",
        f"{result['mask']:.1f}",
        "-" if by_transformers is None else f"{by_transformers:.0e}",
        ", ".join(remarks),
    )


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    lines = [columns, ("---",) * len(columns), *rows]
    return f"\n## {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_page() -> None:
    PAGE.write_text(page(list(read(RESULTS).values())))


if __name__ == "__main__":
    write_page()
