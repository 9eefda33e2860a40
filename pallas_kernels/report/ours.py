"""The four kernels on the report's work: programs, trip counts, bytes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.chips import CHIPS
from pallas_kernels.quantized import quantize
from pallas_kernels.report.stock import Program
from pallas_kernels.report.work import CACHE, ROWS, TRAINING_LENGTH, Model, routing
from pallas_kernels.schedule import MXU, Schedule


@dataclasses.dataclass(frozen=True)
class Subject:
    """A kernel on one piece of work, for one chip.

    Attributes:
      pallas_name: how its schedule's name begins.
      program: what to compile.
      trips: of each loop of its schedule, each time the loop around it runs once.
      hbm_bytes: moved.
      least_bytes: what must be moved.
      tiles: visited and ideal, of an attention mask.
    """

    pallas_name: str
    program: Program
    trips: Callable[[Schedule], list[float]]
    hbm_bytes: int
    least_bytes: int
    tiles: tuple[int, float] | None = None


def loop_trips(
    schedule: Schedule, steps: int | float, dynamic: Callable[[int, Schedule], float] | None = None
) -> list[float]:
    """Trip counts from the schedule, where it tells them, and from the work.

    Inner loops without products that the program runs a fixed number of times clear or write out
    something: they stand under ``pl.when`` and run in the first or last step alone.

    Args:
      schedule: of a kernel.
      steps: of the grid, on one core.
      dynamic: the mean trips of the loop of that index, whose bound is data.
    """
    trips = []
    for i, loop in enumerate(schedule.loops):
        if loop.depth == 1:
            trips.append(float(steps))
        elif loop.trips is None:
            if dynamic is None:
                raise ValueError(f"{schedule.name}: loop {i} is dynamic, which was not expected")
            trips.append(float(dynamic(i, schedule)))
        elif loop.depth == 2 and not loop.usage.used[MXU]:
            trips.append(loop.trips / steps)
        else:
            trips.append(float(loop.trips))
    return trips


def _shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def _weight(weights: str, *sizes: int) -> Any:
    """Shapes of a weight: ``"bfloat16"`` or a scheme of ``quantized``."""
    plain = _shape(*sizes)
    if weights == "bfloat16":
        return plain
    return jax.eval_shape(functools.partial(quantize, scheme=weights), plain)


def confidence_head(
    model: Model, chip: str, rows: int = ROWS, weights: str = "bfloat16"
) -> Subject:
    """The positions of ``rows`` blocks against the whole vocabulary; bfloat16 or int8 weights."""
    from pallas_kernels.confidence_head import api, least_bytes, traffic
    from pallas_kernels.confidence_head.tuning import choose

    tokens = rows * model.block
    size = tokens, model.dim, model.vocabulary
    tiling = choose(*size, 2, 1 if weights == "int8" else 2)
    noted = tiling.chunk_rows // next(n for n in (64, 32, 16) if tiling.chunk_rows % n == 0)

    def head(hidden, weight):
        return api.confidence_head(hidden, weight, implementation="pallas")

    def trips(schedule: Schedule) -> list[float]:
        assert schedule.grid is not None
        steps = float(np.prod(schedule.grid))
        found = loop_trips(schedule, steps)
        products = 0
        for i, loop in enumerate(schedule.loops):
            products += loop.depth > 1 and loop.usage.used[MXU] > 0
            if loop.trips == noted and not loop.usage.used[MXU]:
                found[i] = float(noted)  # scores of every chunk
            elif loop.depth > 2 and not loop.usage.used[MXU]:
                if loop.trips == tiling.chunk_rows // 8:  # mending marked chunks: the last alone
                    found[i] /= steps
            elif loop.depth == 2 and not products and weights != "bfloat16":
                found[i] = float(loop.trips or 1)  # casting a tile, before all its chunks
        return found

    return Subject(
        "confidence_head",
        (head, (_shape(tokens, model.dim), _weight(weights, model.dim, model.vocabulary))),
        trips,
        traffic(*size, head=weights),
        least_bytes(*size, head=weights),
    )


def expert_mlp(model: Model, chip: str, rows: int = ROWS, weights: str = "bfloat16") -> Subject:
    """The experts of the tokens of ``rows`` blocks, routed at random."""
    from pallas_kernels.expert_mlp import api, least_bytes, traffic, tuning

    tokens, cores = rows * model.block, CHIPS[chip].cores
    scheme = None if weights == "bfloat16" else weights
    wide = _weight(weights, 1, model.experts, model.dim, model.ffn)
    down = _weight(weights, 1, model.experts, model.ffn, model.dim)
    chosen = tuning.choose(tokens, model.dim, model.experts_per_token, wide, jnp.bfloat16, cores)
    assert chosen is not None
    experts = routing(model, tokens)
    sizes = np.bincount(experts.reshape(-1), minlength=model.experts)
    sizes = sizes[sizes > 0]
    row_tiles = -(-sizes // chosen.rows)
    tiles = int(row_tiles.sum())

    def mlp(x, gate, up, down, experts, gates):
        layer = jnp.int32(0)
        return api.expert_mlp(
            x, gate, up, down, experts, gates, layer=layer, implementation="pallas"
        )

    def dynamic(i: int, schedule: Schedule) -> float:
        loop = schedule.loops[i]
        if loop.usage.used[MXU]:
            return tiles / len(sizes)  # tiles of rows of a touched expert
        before = any(x.usage.used[MXU] and x.parent == loop.parent for x in schedule.loops[:i])
        if before:  # summing into the tokens, a row at a time
            return sizes.sum() / tiles
        groups = [-(-min(chosen.rows, n - r) // 8) for n in sizes for r in range(0, n, chosen.rows)]
        return sum(groups) / tiles  # gathering, eight rows at a time

    steps = -(-len(sizes) // cores) * (model.ffn // chosen.columns)
    return Subject(
        "expert_mlp",
        (
            mlp,
            (
                *(_shape(tokens, model.dim), wide, wide, down),
                _shape(*experts.shape, dtype=jnp.int32),
                _shape(*experts.shape, dtype=jnp.float32),
            ),
        ),
        lambda schedule: loop_trips(schedule, steps, dynamic),
        traffic(experts, model.dim, model.ffn, model.experts, scheme, cores=cores),
        least_bytes(experts, model.dim, model.ffn, model.experts, scheme),
    )


def block_decode_attention(
    model: Model, chip: str, lengths: np.ndarray, rows: int = ROWS
) -> Subject:
    """A block a row over caches of ``lengths``, which stand for those of the batch in the mean."""
    from pallas_kernels.block_decode_attention import call, least_bytes, traffic, tuning

    cores = CHIPS[chip].cores
    query = rows, model.block, model.heads, model.head_dim
    tiling = tuning.tiling(query, model.kv_heads, CACHE, 2, 2, cores)

    def attention(query, key, value, keys, values, length):
        fresh = jnp.full(rows, model.block, jnp.int32)
        return call.decode_attention(
            query, key, value, keys, values, length, 0, fresh, None, None, cores=cores
        )

    def trips(schedule: Schedule) -> list[float]:
        steps = rows * model.kv_heads // tiling.heads // cores
        tiles = float(np.mean(-(-lengths // tiling.tile)))
        parts = float(np.mean(-(-lengths // tiling.unit))) / tiles  # units of a tile
        cleared = float(np.mean(-lengths % tiling.unit // tuning.GRANULE))  # of a row

        def dynamic(i: int, schedule: Schedule) -> float:
            loop = schedule.loops[i]
            if loop.usage.used[MXU]:
                return tiles if loop.depth == 2 else parts
            # Written twice, before the loop over tiles and in it; a row runs one of them.
            return cleared / tiles if loop.depth == 3 else 0.0

        return loop_trips(schedule, steps, dynamic)

    fresh = _shape(rows, model.kv_heads, model.block, model.head_dim)
    cache = _shape(2, rows, model.kv_heads, CACHE, model.head_dim)
    valid = [int(n) for n in lengths]
    every = (len(valid), *query[1:])
    return Subject(
        "block_decode_attention",
        (attention, (_shape(*query), fresh, fresh, cache, cache, _shape(rows, dtype=jnp.int32))),
        trips,
        traffic(every, model.kv_heads, CACHE, valid, cores=cores) * rows // len(valid),
        least_bytes(every, model.kv_heads, valid) * rows // len(valid),
    )


def block_diffusion_attention(model: Model, chip: str) -> Subject:
    """One row of [x_t ; x_0], forward."""
    from pallas_kernels.block_diffusion_attention import api, geometry, mask, tuning

    length = TRAINING_LENGTH
    of = geometry.Geometry("joint", length, model.block)
    tiles = tuning.tiles_for(of, chip)
    visited, ideal = geometry.tile_counts(of, *tiles.forward)

    def attention(query, key, value, place, document):
        seen = mask.BlockDiffusionMask(place, document, "joint", model.block)
        return api.block_diffusion_attention(
            query, key, value, seen, implementation="pallas", tiles=tiles
        )

    def trips(schedule: Schedule) -> list[float]:
        # Steps that no tile is live in skip its arithmetic: not counted.
        return loop_trips(schedule, visited * model.heads / CHIPS[chip].cores)

    query = _shape(1, 2 * length, model.heads, model.head_dim)
    key = _shape(1, model.kv_heads, 2 * length, model.head_dim)
    place = _shape(1, length, dtype=jnp.int32)
    k_tile = tiles.forward[1]
    once = 2 * 2 * (2 * length * model.heads) * model.head_dim  # queries in, results out
    per_tile = 2 * 2 * k_tile * model.head_dim
    whole_keys = 2 * 2 * 2 * length * model.kv_heads * model.head_dim
    return Subject(
        "splash_mha_fwd",
        (attention, (query, key, key, place, place)),
        trips,
        once + visited * model.heads * per_tile,
        once + whole_keys,
        (visited, ideal),
    )
