"""``vllm-power bench memory --part hits``: reclamation loses no hits, in the scheduler of a server."""

import pytest

from vllm_power.tools.bench import prefix_hits


@pytest.mark.parametrize("pages", prefix_hits.POOLS)
def test_a_second_turn_finds_as_much_as_without_reclamation(pages: int) -> None:
    """Without a place in the order of eviction, 256 tokens were left in all but the largest pool."""
    without, kept = (prefix_hits.second_turn(impl, pages) for impl in prefix_hits.COMPARED)
    assert kept >= without > 2_000


@pytest.mark.parametrize("fit", [4, 6])
def test_chats_that_do_not_all_fit_find_more_and_more_of_them_are_served(fit: int) -> None:
    """Here the schedules differ, too: with reclamation, all eight users are served at once."""
    without, kept = (
        prefix_hits.chats(impl, users=8, fit=fit, first=8192, turns=3) for impl in prefix_hits.COMPARED
    )
    assert kept["value"] > without["value"] + 10
    assert kept["decoding_at_once"] == 8 > without["decoding_at_once"]
