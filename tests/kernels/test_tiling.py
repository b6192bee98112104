"""How sparse products are cut, as far as that can be told without a GPU."""

from __future__ import annotations

import pytest

from sparse_bitnet.kernels.sparse_product.tiling import SHARED_BYTES, TILINGS, Tiling, best_tiling


def at_once(clusters: dict[int, int]) -> dict[Tiling, int]:
    """From clusters by the number of their blocks, each of which has a multiprocessor to itself."""
    return {tiling: tiling.blocks_at_once * clusters[tiling.cluster] for tiling in TILINGS}


H100 = at_once({2: 66, 4: 30, 8: 15})  # as the driver tells
LIFTED = {"2:4": 1, "6:8": 1.5}  # columns, for each of the weight

# Microseconds on an H100 SXM by rows, columns, pattern and tokens: medians of 7 replays of a CUDA graph, weights cold.
# In the order of TILINGS: 256 tokens in 1, 2 and 4 splits, then 128, of which 8 stages were in flight. Measured before
# there were tilings of 64.
MEASURED = {
    (2048, 11008, "2:4", 128): (40.6, 24.2, 27.6, 28.0, 16.8, 11.8),
    (2048, 11008, "2:4", 256): (40.6, 24.2, 17.9, 27.8, 17.0, 22.5),
    (2048, 11008, "6:8", 256): (60.3, 34.0, 23.0, 41.2, 23.6, 29.4),
    (2048, 11008, "2:4", 512): (40.6, 24.6, 34.2, 27.9, 32.8, 33.6),
    (2048, 11008, "6:8", 512): (60.5, 34.5, 44.3, 41.3, 46.3, 44.3),
    (2048, 11008, "6:8", 1024): (60.8, 68.6, 67.5, 41.8, 70.8, 75.7),
    (2048, 11008, "2:4", 2048): (43.6, 75.3, 90.2, 56.1, 86.8, 110.1),
    (3584, 18944, "6:8", 128): (102.9, 64.5, 61.5, 70.1, 38.0, 23.3),
    (3584, 18944, "6:8", 256): (101.2, 54.2, 34.3, 69.0, 38.1, 44.9),
    (3584, 18944, "2:4", 512): (69.7, 39.3, 50.7, 47.8, 53.0, 66.1),
    (3584, 18944, "2:4", 1024): (72.1, 78.8, 102.6, 93.8, 107.3, 132.9),
    (3584, 3584, "6:8", 512): (23.7, 16.4, 28.1, 16.5, 22.1, 35.2),
    (3584, 3584, "2:4", 1024): (18.3, 25.6, 47.9, 21.7, 35.0, 60.0),
    (2048, 2048, "6:8", 128): (14.4, 11.4, 14.1, 10.4, 8.3, 7.4),
    (2048, 2048, "2:4", 1024): (11.6, 19.4, 29.5, 8.7, 20.8, 32.4),
    (22016, 2048, "2:4", 128): (31.3, 40.3, 70.4, 14.8, 22.8, 42.1),
    (22016, 2048, "6:8", 1024): (80.3, 144.7, 268.4, 93.3, 194.4, 334.0),
}


# The same for 64 tokens, by the tilings of as many: 1, 2 and 4 splits, then one with three warpgroups.
OF_64 = TILINGS[6:]
MEASURED_64 = {
    (2560, 2048, "2:4"): (6.6, 5.0, 5.3, 6.9),
    (2560, 2048, "6:8"): (8.4, 5.7, 5.7, 9.3),
    (22016, 2048, "2:4"): (10.3, 19.1, 33.3, 9.6),
    (22016, 2048, "6:8"): (13.6, 22.7, 36.4, 12.4),
    (2048, 11008, "2:4"): (23.1, 12.9, 8.9, 30.8),
    (2048, 11008, "6:8"): (34.2, 18.7, 11.5, 46.2),
    (37888, 3584, "2:4"): (24.8, 41.6, 66.5, 25.3),
    (37888, 3584, "6:8"): (35.6, 51.3, 77.6, 33.3),
    (3584, 18944, "2:4"): (38.7, 21.2, 14.3, 52.6),
    (3584, 18944, "6:8"): (56.9, 30.8, 19.6, 78.3),
}


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_a_tiling_fits_in_shared_memory(tiling: Tiling) -> None:
    assert tiling.stages >= 4
    assert tiling.shared_bytes <= SHARED_BYTES[tiling.blocks_at_once]
    assert tiling.cluster <= 8  # that every Hopper can place
    sums = 4 * 128 * tiling.tokens
    stage = 128 * tiling.tokens + 128 * 128 // 4
    assert sums <= tiling.stages * stage  # what blocks hand to each other lies where stages lay


@pytest.mark.parametrize(("case", "times"), MEASURED.items(), ids=str)
def test_the_choice_is_as_fast_as_the_best_that_was_measured(
    case: tuple[int, int, str, int], times: tuple[float, ...]
) -> None:
    rows, columns, pattern, tokens = case
    chosen = best_tiling(rows // 64, int(columns * LIFTED[pattern]) // 128, tokens, H100)
    assert times[TILINGS.index(chosen)] <= 1.1 * min(times)


@pytest.mark.parametrize(("case", "times"), MEASURED_64.items(), ids=str)
@pytest.mark.parametrize("tokens", [1, 64])
def test_so_it_is_for_few_tokens(case: tuple[int, int, str], times: tuple[float, ...], tokens: int) -> None:
    rows, columns, pattern = case
    chosen = best_tiling(rows // 64, int(columns * LIFTED[pattern]) // 128, tokens, H100)
    assert times[OF_64.index(chosen)] <= 1.1 * min(times)


def test_the_choice_goes_by_what_fits_at_once() -> None:
    """16 tiles of 128 tokens in 4 parts: worth it only where 16 clusters of 8 blocks fit."""
    assert best_tiling(32, 86, 256, H100) != Tiling(128, splits=4)
    assert best_tiling(32, 86, 256, at_once({2: 66, 4: 33, 8: 16})) == Tiling(128, splits=4)


def test_many_tiles_are_not_split() -> None:
    assert best_tiling(32, 129, 16384, H100) == Tiling(256)
    assert best_tiling(592, 42, 2048, H100) == Tiling(256)


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize("tokens", [1, 129, 5000])
@pytest.mark.parametrize("clusters", [{2: 1, 4: 0, 8: 0}, {2: 7, 4: 3, 8: 1}, {2: 66, 4: 30, 8: 15}], ids=str)
def test_no_block_is_without_a_stage_or_a_place(stages: int, tokens: int, clusters: dict[int, int]) -> None:
    tiling = best_tiling(1, stages, tokens, at_once(clusters))
    assert tiling.splits <= stages
    assert at_once(clusters)[tiling]


def test_a_tile_covers_its_rows_and_tokens() -> None:
    assert Tiling(256).tiles(groups=5, tokens=257) == (2, 2)
    assert Tiling(128, splits=4).tiles(groups=4, tokens=128) == (1, 1)
