"""How the result of a sparse product is cut among the multiprocessors of a GPU.

Two blocks of threads have a tile of `tokens` in common. Where few tiles would leave multiprocessors idle, `splits` such
pairs share one, each with a part of the lifted columns. Of all ways that is taken which is reckoned to be the fastest.

Shapes: G groups of 64 rows, S stages of 128 lifted columns (formats/fragments.py), T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparse_bitnet.formats.fragments import COLUMNS, INSTRUCTIONS, ROWS

ROW_BLOCKS = 2
DEPTH = COLUMNS * INSTRUCTIONS
SHARED_BYTES = {1: 227 * 1024, 2: 113 * 1024}  # that a block of Hopper can have, by blocks of a multiprocessor
MOST_STAGES = 16

# Nanoseconds of a block, fitted on an H100 to products of 6 shapes with 64 to 2,048 tokens by every tiling; some of
# their times are in tests/kernels/test_tiling.py.
STAGE_NS, STAGE_NS_OF_TOKEN = {256: 160, 128: 160, 64: 100}, 1.1
SHARED_STAGE_NS = 60  # more, where a multiprocessor runs two blocks
RESULT_NS_OF_TOKEN = 12
EXCHANGE_NS, EXCHANGE_NS_OF_TOKEN = {256: 1000, 128: 1000, 64: 0}, 30


@dataclass(frozen=True)
class Tiling:
    """warpgroups: of a block, that multiply 64 rows each."""

    tokens: int
    splits: int = 1
    warpgroups: int = 2

    @property
    def block_rows(self) -> int:
        return self.warpgroups * ROWS

    @property
    def threads(self) -> int:
        """Of a block: another warp loads."""
        return 128 * self.warpgroups + 32

    @property
    def cluster(self) -> int:
        """Blocks that work on a tile together."""
        return ROW_BLOCKS * self.splits

    @property
    def blocks_at_once(self) -> int:
        """That a multiprocessor runs."""
        return 2 if self == Tiling(64) else 1

    @property
    def together(self) -> int:
        """Stages that a warpgroup multiplies at a time: where tokens are few, it would mostly wait."""
        return 2 if self.tokens == 64 else 1

    @property
    def stages(self) -> int:
        """In flight."""
        room = SHARED_BYTES[self.blocks_at_once] - self._before_stages
        return min(MOST_STAGES, room // self._stage_bytes)

    @property
    def shared_bytes(self) -> int:
        return self._before_stages + self.stages * self._stage_bytes

    @property
    def definitions(self) -> dict[str, int]:
        """For the preprocessor of the kernel."""
        return {
            "TOKENS": self.tokens, "SPLITS": self.splits, "WARPGROUPS": self.warpgroups, "STAGES": self.stages,
            "TOGETHER": self.together, "BLOCKS_AT_ONCE": self.blocks_at_once,
        }  # fmt: skip

    @property
    def _before_stages(self) -> int:
        barriers_and_factors = 1024 + self.warpgroups * (ROWS + self.tokens) * 8
        results = self.block_rows * self.tokens // self.splits * 2
        return 1024 * -(-barriers_and_factors // 1024) + results

    @property
    def _stage_bytes(self) -> int:
        return self.tokens * DEPTH + self.block_rows * DEPTH // 4

    def tiles(self, groups: int, tokens: int) -> tuple[int, int]:
        """Of rows, and of tokens."""
        return -(-groups * ROWS // (ROW_BLOCKS * self.block_rows)), -(-tokens // self.tokens)

    def nanoseconds(self, groups: int, stages: int, tokens: int, at_once: int) -> float:
        """About how long a product takes, of whose tiles `at_once` are worked on at a time.

        A tile takes its stages, then so long for each token whose results a block writes, and where columns are split,
        for the exchange and each token whose sums a block hands over.
        """
        row_tiles, token_tiles = self.tiles(groups, tokens)
        own_tokens = self.tokens / self.splits
        stage = STAGE_NS[self.tokens] + STAGE_NS_OF_TOKEN * self.tokens + SHARED_STAGE_NS * (self.blocks_at_once - 1)
        tile = -(-stages // self.splits) * stage
        tile += RESULT_NS_OF_TOKEN * own_tokens
        if self.splits > 1:
            tile += EXCHANGE_NS[self.tokens] + EXCHANGE_NS_OF_TOKEN * (self.tokens - own_tokens)
        return -(-row_tiles * token_tiles // at_once) * tile


TILINGS = (*(Tiling(tokens, splits) for tokens in (256, 128, 64) for splits in (1, 2, 4)), Tiling(64, warpgroups=3))


def best_tiling(groups: int, stages: int, tokens: int, at_once: Mapping[Tiling, int]) -> Tiling:
    """Of those that leave no block without a stage, the one that takes the least time.

    at_once  how many clusters a GPU runs at a time
    """
    wide_enough = [tiling for tiling in TILINGS if tiling.tokens >= min(tokens, 128)]  # with 64, more were not measured
    possible = [tiling for tiling in wide_enough if tiling.splits <= stages and at_once[tiling]]
    return min(possible, key=lambda tiling: tiling.nanoseconds(groups, stages, tokens, at_once[tiling]))
