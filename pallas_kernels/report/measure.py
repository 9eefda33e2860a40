"""Compiles kernels and stock alternatives and puts their figures side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels import aot, schedule
from pallas_kernels.report import ours, program, stock
from pallas_kernels.report.call import Call
from pallas_kernels.report.entry import Entry
from pallas_kernels.report.work import (
    CACHE,
    CACHED,
    MODELS,
    ROWS,
    TRAINING_LENGTH,
    WEIGHTS,
    Model,
    ragged_lengths,
    routing,
)

KERNELS = (
    "block_decode_attention",
    "confidence_head",
    "expert_mlp",
    "block_diffusion_attention",
)


# The kernels of a decode step, and the weights that each reads as they are.
CALLED = {
    "block_decode_attention": ("bfloat16",),
    "confidence_head": ("bfloat16", "int8"),
    "expert_mlp": WEIGHTS,
}


def entries(
    dump: str, chip: str, kernels: tuple[str, ...] = KERNELS, log: Callable[[str], None] = print
) -> Iterator[Entry]:
    """The report for one chip; this process called ``aot.prepare(dump)`` first.

    Args:
      dump: a folder for the compiler's dumps; emptied.
      chip: a key of ``CHIPS``.
      kernels: which.
      log: is told what is compiled.
    """
    for kernel in kernels:
        for model in MODELS.values():
            log(f"{chip} {model.name} {kernel}")
            yield from _MEASURES[kernel](dump, chip, model)


def calls(
    dump: str,
    chip: str,
    rows: Sequence[int],
    weights: Sequence[str],
    kernels: Sequence[str] = KERNELS,
    log: Callable[[str], None] = print,
) -> Iterator[Call]:
    """The kernels of a decode step of mini, without their stock alternatives.

    Args:
      dump, chip, kernels, log: as for ``entries``.
      rows: blocks decoded together.
      weights: ``"bfloat16"`` or schemes. The head is compiled for those that it reads as they are;
        attention, which has no weights, once.
    """
    model = MODELS["mini"]
    for kernel in kernels:
        for scheme in weights if kernel in CALLED else ():
            if scheme not in CALLED[kernel]:
                continue
            for count in rows:
                log(f"{chip} {model.name} {kernel} {scheme} {count} rows")
                touched = None
                if kernel == "block_decode_attention":
                    lengths = np.array([CACHED], np.int32)
                    subject = ours.block_decode_attention(model, chip, lengths, count)
                elif kernel == "confidence_head":
                    subject = ours.confidence_head(model, chip, count, scheme)
                else:
                    subject = ours.expert_mlp(model, chip, count, scheme)
                    touched = len(np.unique(routing(model, count * model.block)))
                found = _ours(dump, chip, subject)
                names = {field.name for field in dataclasses.fields(Call)}
                figures = {k: v for k, v in found.items() if k in names}
                cached = CACHED if kernel == "block_decode_attention" else None
                yield Call(
                    kernel, chip, model.name, count, scheme, **figures,
                    experts=touched, cache_length=cached,
                )  # fmt: skip


def _ours(dump: str, chip: str, subject: ours.Subject) -> dict[str, Any]:
    function, shapes = subject.program
    with jax.set_mesh(aot.mesh(chip)):  # by which a kernel knows the chip
        _, schedules = schedule.record(dump, chip, function, *shapes)
    found = next(s for s in schedules if s.name.startswith(subject.pallas_name))
    trips = subject.trips(found)
    inner = found.inner
    return {
        "bundles": round(found.run(trips)),
        "mxu_occupancy": round(inner.occupancy(schedule.MXU), 3),
        "spill_slots": inner.spill_slots,
        "other_spill_slots": found.usage.spill_slots - inner.spill_slots,
        "hbm_bytes": subject.hbm_bytes,
        "hbm_bytes_least": subject.least_bytes,
        "loops": tuple(
            (loop.own.bundles, round(count, 3))
            for loop, count in zip(found.loops, trips, strict=True)
        ),
        "visited_tiles": subject.tiles and subject.tiles[0],
        "ideal_tiles": subject.tiles and round(subject.tiles[1], 1),
    }


def _stock(
    dump: str,
    chip: str,
    name: str,
    built: stock.Program,
    trips: Mapping[str, int | float] | None = None,
) -> dict[str, Any]:
    function, shapes = built
    compiled, schedules = schedule.record(dump, chip, function, *shapes)
    found = program.cost(compiled.as_text() or "", schedules, trips)
    return {
        "stock": name,
        "stock_bundles": round(found.bundles),
        "stock_cycles": found.cycles,
        "stock_mxu_occupancy": round(found.mxu_occupancy, 3),
        "stock_spill_slots": found.spill_slots,
        "stock_hbm_bytes": found.hbm_bytes,
        "note": f"stock: trips of {', '.join(found.uncounted)} unknown" if found.uncounted else "",
    }


def _decode(dump: str, chip: str, model: Model) -> Iterator[Entry]:
    figures = _stock(
        dump, chip, "splash, full mask", stock.splash_over_the_cache(model, ROWS, CACHE)
    )
    figures["stock_cycles"] = 0
    full = np.array([CACHE - model.block], np.int32)
    for title, lengths in (("full", full), ("1/8 to full", ragged_lengths(block=model.block))):
        subject = ours.block_decode_attention(model, chip, lengths)
        shape = f"{model.name} {ROWS} rows, cache {CACHE} {title}"
        yield Entry("block_decode_attention", chip, shape, **_ours(dump, chip, subject), **figures)


def _head(dump: str, chip: str, model: Model) -> Iterator[Entry]:
    tokens = ROWS * model.block
    figures = _stock(
        dump, chip, "matmul, softmax, argmax", stock.matmul_softmax_argmax(model, tokens)
    )
    subject = ours.confidence_head(model, chip)
    shape = f"{model.name} {tokens} positions"
    yield Entry("confidence_head", chip, shape, **_ours(dump, chip, subject), **figures)


def _experts(dump: str, chip: str, model: Model) -> Iterator[Entry]:
    tokens = ROWS * model.block
    experts = routing(model, tokens)
    trips = {"ragged-dot-none": stock.ragged_tiles(experts, model.experts)}
    figures = _stock(dump, chip, "ragged_dot x 3", stock.three_ragged_dots(model, tokens), trips)
    touched = len(np.unique(experts))
    untouched = model.experts - touched  # their weights are not fetched
    figures["stock_hbm_bytes"] -= 3 * 2 * untouched * model.dim * model.ffn
    figures["stock_cycles"] = 0
    subject = ours.expert_mlp(model, chip)
    shape = f"{model.name} {tokens} tokens, {touched} experts"
    yield Entry("expert_mlp", chip, shape, **_ours(dump, chip, subject), **figures)


def _training(dump: str, chip: str, model: Model) -> Iterator[Entry]:
    # XLA takes long over it, and heads are alike: compiled once, counted by heads.
    small = MODELS["mini"]
    figures = _dense(dump, chip)
    times = model.heads // small.heads
    for name in ("stock_bundles", "stock_cycles", "stock_hbm_bytes"):
        figures[name] *= times
    subject = ours.block_diffusion_attention(model, chip)
    shape = f"{model.name} [x_t ; x_0] of {TRAINING_LENGTH}, forward"
    entry = Entry("block_diffusion_attention", chip, shape, **_ours(dump, chip, subject), **figures)
    note = f"stock: {times} times that of {small.name}"
    yield entry if times == 1 else dataclasses.replace(entry, note=note)


_dense_figures: dict[str, dict[str, Any]] = {}


def _dense(dump: str, chip: str) -> dict[str, Any]:
    if chip not in _dense_figures:
        dense = stock.dense_masked_attention(MODELS["mini"], TRAINING_LENGTH)
        _dense_figures[chip] = _stock(dump, chip, "dense mask in XLA", dense)
    return dict(_dense_figures[chip])


_MEASURES = {
    "block_decode_attention": _decode,
    "confidence_head": _head,
    "expert_mlp": _experts,
    "block_diffusion_attention": _training,
}
