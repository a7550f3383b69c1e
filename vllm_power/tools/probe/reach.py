"""Which blocks can know a key at all, by the graph of the pattern."""

from collections.abc import Collection

from vllm_power.pattern import Pattern, preset


def reached(
    pattern: Pattern, dense_layers: Collection[int], layers: int, key: int, blocks: int
) -> list[list[int]]:
    """For the embeddings and after each layer: the blocks, ascending, that block ``key`` can have reached by then.

    dense_layers: those that do not run the pattern; taken as seeing everything.
    """
    full = preset("full", block_size=pattern.block_size)
    known = {key}
    found = [sorted(known)]
    for layer in range(layers):
        sees = full if layer in dense_layers else pattern
        known |= {q for q in range(key, blocks) if not known.isdisjoint(sees.visible_blocks(q))}
        found.append(sorted(known))
    return found
