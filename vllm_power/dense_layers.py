"""Which layers stay dense: a list of indices, ranges as text, or so many of every so many (the paper, for RULER)."""

from collections.abc import Mapping, Sequence
from typing import Any

DenseLayers = Sequence[int] | str | Mapping[str, int]

MOST = 10_000  # more layers than any model has: what goes past it is a slip, and must not fill the memory


def indices(value: DenseLayers, num_layers: int) -> frozenset[int]:
    """The indices that ``value`` names in a model of ``num_layers`` layers.

    [0, 27] and "0,27" name layers, "0-1,26-27" ranges with both ends, {"every": 7, "keep": 2} the first two of every
    seven. Raises ValueError where it is none of these, and for an index outside the model.
    """
    if isinstance(value, Mapping):
        every, keep = _every(value)
        return frozenset(index for index in range(num_layers) if index % every < keep)
    named = frozenset(_ranges(value) if isinstance(value, str) else value)
    outside = sorted(index for index in named if not 0 <= index < num_layers)
    if outside:
        raise ValueError(
            f"dense_layers names layer {', '.join(map(str, outside))}; the model has {num_layers} layers, "
            f"0 to {num_layers - 1}"
        )
    return named


def canonical(value: Any) -> frozenset[int] | tuple[int, int]:
    """A form in which two ways of naming the same layers are equal. Raises ValueError where ``value`` names none."""
    if isinstance(value, Mapping):
        return _every(value)
    if isinstance(value, str):
        return frozenset(_ranges(value))
    if isinstance(value, Sequence) and all(type(index) is int for index in value):
        return frozenset(value)
    raise ValueError(
        f'dense_layers must be like [0, 27], "0-1,26-27" or {{"every": 7, "keep": 2}}, not {value!r}'
    )


def _every(value: Mapping[str, int]) -> tuple[int, int]:
    if set(value) != {"every", "keep"} or not all(type(number) is int for number in value.values()):
        raise ValueError(f'dense_layers must be like {{"every": 7, "keep": 2}}, not {dict(value)!r}')
    if not 0 <= value["keep"] <= value["every"] or value["every"] < 1:
        raise ValueError(f"dense_layers can not keep {value['keep']} of every {value['every']} layers")
    return value["every"], value["keep"]


def _ranges(text: str) -> list[int]:
    named: list[int] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()) or part.endswith("-"):
            raise ValueError(f'dense_layers: {part!r} is neither a layer nor a range like "26-27"')
        if int(last or first) < int(first):
            raise ValueError(f"dense_layers: the range {part} runs backwards")
        if int(last or first) > MOST:
            raise ValueError(f"dense_layers: {part} names layers that no model has")
        named.extend(range(int(first), int(last or first) + 1))
    return named
