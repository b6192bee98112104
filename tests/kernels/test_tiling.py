"""How sparse products are cut, as far as that can be told without a GPU."""

from __future__ import annotations

import pytest

from sparse_bitnet.kernels.sparse_product.tiling import SHARED_BYTES, TILINGS, Tiling, best_tiling

H100 = 132  # multiprocessors


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_a_tiling_fits_in_shared_memory(tiling: Tiling) -> None:
    assert tiling.stages >= 4
    assert tiling.shared_bytes <= SHARED_BYTES
    assert tiling.cluster <= 8  # that every Hopper can place
    sums = 4 * 64 * tiling.warpgroups * tiling.tokens
    stage = 128 * tiling.tokens + 64 * tiling.warpgroups * 128 // 4
    assert sums <= tiling.stages * stage  # what blocks hand to each other lies where stages lay


def test_columns_are_split_where_tiles_are_few() -> None:
    stages = 11008 * 3 // 2 // 128
    assert best_tiling(32, stages, 256, H100).splits == 4  # 2,048 rows: 8 tiles of 256 rows
    assert best_tiling(32, stages, 16384, H100) == Tiling(256)
    assert best_tiling(592, 42, 2048, H100).splits == 1  # 37,888 rows


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize("tokens", [1, 129, 5000])
@pytest.mark.parametrize("multiprocessors", [2, 78, 132])
def test_no_block_is_without_a_stage_or_a_place(stages: int, tokens: int, multiprocessors: int) -> None:
    tiling = best_tiling(1, stages, tokens, multiprocessors)
    assert tiling.splits <= stages
    assert tiling.cluster <= multiprocessors


def test_a_tile_covers_its_rows_and_tokens() -> None:
    assert Tiling(256).tiles(groups=5, tokens=257) == (2, 2)
    assert Tiling(128, splits=4).tiles(groups=4, tokens=128) == (1, 1)
