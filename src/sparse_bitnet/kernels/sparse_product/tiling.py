"""How the result of a sparse product is cut among the multiprocessors of a GPU.

A block of threads has a tile of 64 rows a warpgroup x `tokens`; two blocks share their tokens. Where that gives fewer
blocks than there are multiprocessors, `splits` such pairs share a tile, each with a part of the lifted columns.

Shapes: G groups of 64 rows, S stages of 128 lifted columns (formats/fragments.py), T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparse_bitnet.formats.fragments import COLUMNS, INSTRUCTIONS, ROWS

ROW_BLOCKS = 2
DEPTH = COLUMNS * INSTRUCTIONS
FRAGMENT_BYTES = ROWS * DEPTH // 4
SHARED_BYTES = 227 * 1024  # that a block of Hopper can have
MOST_STAGES = 8
SHARED_BYTES_PER_CYCLE = 128  # read or written: what bounds a stage
EPILOGUE_RESULTS_PER_CYCLE = 16  # of a block
EXCHANGE_BYTES_PER_CYCLE, EXCHANGE_CYCLES = 14, 1000  # of a block, through distributed shared memory


@dataclass(frozen=True)
class Tiling:
    tokens: int
    splits: int = 1
    warpgroups: int = 2

    @property
    def cluster(self) -> int:
        """Blocks that work on a tile of `rows` x `tokens`."""
        return ROW_BLOCKS * self.splits

    @property
    def rows(self) -> int:
        return ROW_BLOCKS * self.warpgroups * ROWS

    @property
    def threads(self) -> int:
        return 128 * self.warpgroups + (128 if self.warpgroups == 4 else 32)

    @property
    def stages(self) -> int:
        """In flight."""
        return min(MOST_STAGES, (SHARED_BYTES - self._before_stages) // self._stage_bytes)

    @property
    def shared_bytes(self) -> int:
        return self._before_stages + self.stages * self._stage_bytes

    @property
    def definitions(self) -> dict[str, int]:
        """For the preprocessor of the kernel."""
        return {
            "WARPGROUPS": self.warpgroups, "TOKENS": self.tokens, "SPLITS": self.splits, "STAGES": self.stages
        }  # fmt: skip

    @property
    def _before_stages(self) -> int:
        barriers_and_factors = 1024 + self.warpgroups * self.tokens * 8
        results = self.warpgroups * ROWS * self.tokens // self.splits * 2
        return 1024 * -(-barriers_and_factors // 1024) + results

    @property
    def _stage_bytes(self) -> int:
        return self.tokens * DEPTH + self.warpgroups * FRAGMENT_BYTES

    def tiles(self, groups: int, tokens: int) -> tuple[int, int]:
        """Of rows, and of tokens."""
        return -(-groups * ROWS // self.rows), -(-tokens // self.tokens)

    def cycles(self, groups: int, stages: int, tokens: int, multiprocessors: int) -> float:
        """About how long it takes: as long as shared memory is read and written, and what follows a tile."""
        row_tiles, token_tiles = self.tiles(groups, tokens)
        waves = -(-row_tiles * token_tiles // (multiprocessors // self.cluster))
        read = self.warpgroups * (self.tokens * DEPTH + FRAGMENT_BYTES)
        stage = (read + self._stage_bytes) / SHARED_BYTES_PER_CYCLE
        results = self.warpgroups * ROWS * self.tokens
        after = results / self.splits / EPILOGUE_RESULTS_PER_CYCLE
        if self.splits > 1:
            given = 4 * results * (self.splits - 1) / self.splits
            after += given / EXCHANGE_BYTES_PER_CYCLE + EXCHANGE_CYCLES
        return waves * (-(-stages // self.splits) * stage + after)


TILINGS = tuple(Tiling(tokens, splits) for tokens in (256, 128) for splits in (1, 2, 4))


def best_tiling(groups: int, stages: int, tokens: int, multiprocessors: int) -> Tiling:
    """Of those that leave no block without a stage, the one that takes the fewest cycles."""
    possible = [tiling for tiling in TILINGS if tiling.splits <= stages and tiling.cluster <= multiprocessors]
    return min(possible, key=lambda tiling: tiling.cycles(groups, stages, tokens, multiprocessors))
