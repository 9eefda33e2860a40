"""Tile sizes of the confidence head."""

from __future__ import annotations

import dataclasses

LANES = 128
# Scores held at once. Many rows amortise loading the matrix unit, four registers of columns a row
# amortise the rescaling; with fewer rows, wider chunks make the compiler spill registers.
_ROWS = 256
_COLUMNS = 512
_COLUMNS_OF_FEW_ROWS = 256
_MAX_ROWS = 1024  # hidden states that stay in VMEM
_HIDDEN_BYTES = 16 << 20
_TILE_BYTES = 4 << 20  # of the head in one transfer: long enough to hide a grid step's overhead


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How ``[M, D] x [D, V]`` is cut.

    Attributes:
      rows: hidden states resident at a time; M is padded to a multiple.
      chunk_rows: rows of the scores held at once; divides ``rows``.
      columns: of the head in one transfer.
      chunk_columns: columns of the scores held at once; divides ``columns``.
      partitions: of the vocabulary, given to different cores where a device has two.
      tiles: transfers of a partition.
      row_tiles: passes over the head.
    """

    rows: int
    chunk_rows: int
    columns: int
    chunk_columns: int
    partitions: int
    tiles: int
    row_tiles: int

    @property
    def row_chunks(self) -> int:
        """Chunks of rows in one resident tile."""
        return self.rows // self.chunk_rows

    @property
    def column_chunks(self) -> int:
        """Chunks of columns in one transfer."""
        return self.columns // self.chunk_columns


def choose(m: int, d: int, v: int, hidden_bytes: int, head_bytes: int) -> Tiling:
    """Tiles for ``M, D, V`` and bytes an element; within 48 MiB of VMEM up to D = 4096 float32."""
    chunk_rows = min(_ROWS, _up(m, 16))
    wide = _COLUMNS if chunk_rows == _ROWS else _COLUMNS_OF_FEW_ROWS
    chunk_columns = min(wide, _up(v, LANES))
    wanted = max(1, _TILE_BYTES // (d * head_bytes * chunk_columns))
    # A power of two, and no more than the vocabulary needs.
    copies = 1 << (min(wanted, -(-v // chunk_columns)).bit_length() - 1)
    columns = copies * chunk_columns
    tiles = -(-v // columns)
    partitions = min(2, tiles)
    most = max(chunk_rows, min(_MAX_ROWS, _HIDDEN_BYTES // (d * hidden_bytes)))
    row_tiles = -(-_up(m, chunk_rows) // (most - most % chunk_rows))
    return Tiling(
        rows=_up(-(-m // row_tiles), chunk_rows),
        chunk_rows=chunk_rows,
        columns=columns,
        chunk_columns=chunk_columns,
        partitions=partitions,
        tiles=-(-tiles // partitions),
        row_tiles=row_tiles,
    )


def _up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
