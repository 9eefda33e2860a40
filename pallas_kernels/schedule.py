"""Reads the TPU compiler's schedule of a Pallas kernel or of an XLA fusion.

The compiler writes, for each kernel, its final instruction bundles, the loops they lie in, and the
slots that each bundle uses (``aot.prepare(dump)`` asks for it). All of this is static: a bundle is
one issue of the core, and the figures repeat exactly, but a stall on memory is not in them.

From the shell: ``python -m pallas_kernels.schedule FOLDER [name]`` prints what lies in a dump.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

MXU, VALU, LOAD, FILL, STORE, SPILL = "MXU", "VALU", "VLOAD", "VLOAD:FILL", "VSTORE", "VSTORE:SPILL"

DYNAMIC = 2**31 - 1  # what the compiler writes for a bound that it does not know

_FILE = re.compile(r"^(?P<time>\d+)-(?P<name>.+)-(?P<step>\d+)-final_bundles\.txt$")
_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(LH|LB|LE|PB|PF|CT)?\s*:\s*((?:>\s*)*)\{(.*)")
_EXIT = re.compile(r"(%p\d+_p\d+) = scmp\.ge\.s32\.totalorder (?:\(\S+\), )?%\w+, (\d+|%\w+)")
_BACK = re.compile(r"sbr\.rel \(!(%p\d+_p\d+)\)")
_BOUNDS = re.compile(r"^iteration_bounds: \(([\d, ]+)\)", re.MULTILINE)
_GAP = 8
_SCALAR_SPILL = re.compile(r"#allocation\d+_spill")


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a stretch of the schedule holds.

    Attributes:
      bundles: instruction bundles.
      empty: those without an instruction (waits that the scheduler could not fill).
      used: slots used, by kind (``"MXU"``, ``"VALU"``, ``"VLOAD"``, ...).
      capacity: slots of each kind in one bundle of this chip.
    """

    bundles: int
    empty: int
    used: Mapping[str, int]
    capacity: Mapping[str, int]

    def occupancy(self, slot: str) -> float:
        """The share of the slots of a kind that is used, between 0 and 1."""
        return self.used[slot] / max(self.bundles * self.capacity[slot], 1)

    @property
    def spill_slots(self) -> int:
        """Stores to and loads from the stack because the vector registers do not suffice."""
        return self.used[SPILL] + self.used[FILL]


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of the schedule; the grid of a Pallas kernel is one flat loop.

    Attributes:
      start, end: its bundles are ``start ... end - 1``.
      depth: 1 for an outermost loop.
      parent: index of the loop around it in ``Schedule.loops``; ``None`` for an outermost one.
      usage: all of its bundles, with the loops inside.
      own: without the loops inside.
      trips: of a loop whose bound is written into the program; else ``None``. A grid's includes
        the one or two steps by which its copies run ahead.
    """

    start: int
    end: int
    depth: int
    parent: int | None
    usage: Usage
    own: Usage
    trips: int | None = None


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The final schedule of one kernel or fusion.

    Attributes:
      name: the compiler's name for it: ``NAME.1``, where ``NAME`` is what ``pallas_call`` was told.
      usage: the whole.
      outside: what lies in no loop.
      loops: in the order of their first bundles.
      scalar_spills: instructions that spill or reload a scalar (cheap; not in ``spill_slots``).
      grid: of a Pallas kernel that leaves its copies to Pallas, the grid that one core walks
        (a parallel dimension is divided over the cores); ``DYNAMIC`` where only the run decides.
    """

    name: str
    usage: Usage
    outside: Usage
    loops: tuple[Loop, ...]
    scalar_spills: int
    grid: tuple[int, ...] | None = None

    @property
    def inner(self) -> Usage:
        """The loop that computes: of the innermost loops the one with the most MXU slots in use.

        Loops without the MXU do not count, if any loop uses it. Without loops: the whole.
        """
        parents = {loop.parent for loop in self.loops}
        leaves = [loop.usage for i, loop in enumerate(self.loops) if i not in parents]
        busy = [usage for usage in leaves if usage.used[MXU]]
        if not busy:  # the products may lie in an outer loop, next to a small inner one
            busy = [loop.own for loop in self.loops if loop.own.used[MXU]] or leaves
        return max(busy, key=lambda u: (u.used[MXU], u.bundles), default=self.usage)

    def run(self, trips: Sequence[int | float] | int | float) -> float:
        """Bundles issued in one call: static bundles times trips.

        Every bundle of a loop counts in every trip, also those under a ``pl.when``: an upper bound.

        Args:
          trips: for each of ``loops``, how often it is run each time that the loop around it
            runs once; one number for a schedule with one loop or none.

        Raises:
          ValueError: for another number of trip counts than loops.
        """
        if isinstance(trips, int | float):
            trips = (trips,) * min(len(self.loops), 1)
        if len(trips) != len(self.loops):
            raise ValueError(
                f"{self.name} has {len(self.loops)} loops, got {len(trips)} trip counts: "
                f"give one a loop ({describe(self)})"
            )
        total = float(self.outside.bundles)
        times: list[float] = []
        for loop, count in zip(self.loops, trips, strict=True):
            times.append(count * (1.0 if loop.parent is None else times[loop.parent]))
            total += loop.own.bundles * times[-1]
        return total


def parse(name: str, bundles: str, utilization: str) -> Schedule:
    """Reads one schedule.

    Args:
      name: of the kernel.
      bundles: the text of ``...-final_bundles.txt``.
      utilization: the text of ``...-final_hlo-static-per-bundle-utilization.txt``.

    Raises:
      ValueError: where the two texts do not belong together or are not what the compiler writes.
    """
    capacity, rows = _utilization(name, utilization)
    marks = [m for m in map(_BUNDLE.match, bundles.splitlines()) if m]
    if len(marks) != len(rows):
        raise ValueError(
            f"{name}: {len(marks)} bundles but {len(rows)} rows of slot use: the dump is "
            "incomplete or from another compiler; compile again into an empty folder"
        )
    empty = [m[4].lstrip().startswith("}") for m in marks]
    depths: list[int] = []
    for mark, nothing in zip(marks, empty, strict=True):
        # Empty bundles carry no depth marks: they wait for what stands before them.
        depths.append(depths[-1] if nothing and depths else mark[3].count(">"))
    _close_gaps(depths, [m[2] for m in marks])

    def usage(where: Iterable[int]) -> Usage:
        where = list(where)
        used = {slot: sum(rows[i][k] for i in where) for k, slot in enumerate(capacity)}
        return Usage(len(where), sum(empty[i] for i in where), used, capacity)

    ranges = _ranges(depths, [m[2] == "LB" for m in marks])
    trips = _trips(ranges, [m[4] for m in marks], bundles)
    loops = tuple(
        Loop(
            start,
            end,
            depth,
            parent,
            usage(range(start, end)),
            usage(i for i in range(start, end) if depths[i] == depth),
            count,
        )
        for (start, end, depth, parent), count in zip(ranges, trips, strict=True)
    )
    return Schedule(
        name,
        usage(range(len(marks))),
        usage(i for i, depth in enumerate(depths) if depth == 0),
        loops,
        sum(len(_SCALAR_SPILL.findall(m[4])) for m in marks),
        _grid(bundles),
    )


def _trips(
    ranges: Sequence[tuple[int, int, int, int | None]], texts: Sequence[str], bundles: str
) -> list[int | None]:
    """The bounds against which the branches back to the loops' starts are decided."""
    limits = dict(_EXIT.findall(bundles))
    trips: list[int | None] = [None] * len(ranges)
    closed: set[int] = set()
    for at, text in enumerate(texts):
        for predicate in _BACK.findall(text):
            if predicate not in limits:
                continue
            # The branch and the bundles after it that it still issues are the last of a loop.
            near = [i for i, r in enumerate(ranges) if r[0] <= at and abs(r[1] - at) <= _GAP]
            still = [i for i in near if i not in closed]
            if still:
                last = max(still, key=lambda i: ranges[i][2])
                closed.add(last)
                trips[last] = int(limits[predicate]) if limits[predicate].isdigit() else None
    return trips


def _grid(bundles: str) -> tuple[int, ...] | None:
    found = Counter(_BOUNDS.findall(bundles)).most_common(1)
    return tuple(int(n) for n in found[0][0].split(",")) if found else None


def _close_gaps(depths: list[int], marks: Sequence[str | None]) -> None:
    """A branch back may stand in bundles with the marks of the loop around: they belong inside."""
    for i in range(1, len(depths)):
        if depths[i] > depths[i - 1] and marks[i] != "LB":
            for before in range(i - 1, max(i - 1 - _GAP, -1), -1):
                if depths[before] >= depths[i]:
                    depths[before + 1 : i] = [depths[i]] * (i - before - 1)
                    break


def _ranges(
    depths: Sequence[int], starts: Sequence[bool]
) -> list[tuple[int, int, int, int | None]]:
    """``(start, end, depth, parent)`` of each loop."""
    ranges: list[tuple[int, int, int, int | None]] = []
    for start, (mark, depth) in enumerate(zip(starts, depths, strict=True)):
        before = depths[start - 1] if start else 0
        if not mark and depth <= before:
            continue
        # Loops whose bodies begin at the same bundle share one mark: one range for each depth.
        for level in range(min(before + 1, depth), depth + 1):
            inside = (
                i
                for i in range(start + 1, len(depths))
                if depths[i] < level or (depths[i] == level and starts[i])
            )
            around = [k for k, r in enumerate(ranges) if r[2] < level and r[0] <= start < r[1]]
            ranges.append((start, next(inside, len(depths)), level, around[-1] if around else None))
    return ranges


def _utilization(name: str, text: str) -> tuple[dict[str, int], list[list[int]]]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    head = next((i for i, line in enumerate(lines) if line.startswith(MXU)), None)
    if head is None or head + 2 >= len(lines):
        raise ValueError(f"{name}: no slot capacities in the utilisation file")
    slots = [slot.strip() for slot in lines[head].split(",")]
    capacity = dict(zip(slots, map(int, lines[head + 1].split()), strict=True))
    rows = [[int(n) for n in line.split()] for line in lines[head + 2 :] if line[0].isdigit()]
    return capacity, rows


def collect(dump: str | Path, name: str | None = None) -> list[Schedule]:
    """All schedules of a dump, oldest first.

    Args:
      dump: the folder that ``aot.prepare`` was told.
      name: only kernels and fusions of this name, with or without the compiler's ``.1``.
        ``None``: all but the compiler's own start and end of a program.
    """
    files = list(Path(dump).iterdir())
    schedules = []
    for path in sorted(files, key=lambda path: int((re.match(r"\d+", path.name) or [0])[0])):
        match = _FILE.match(path.name)
        full = match["name"] if match else ""
        if not match or (full[:5] == "<late" if name is None else name not in (full, _bare(full))):
            continue
        start, end = f"{match['time']}-{full}-", "-final_hlo-static-per-bundle-utilization.txt"
        for beside in files:
            if beside.name.startswith(start) and beside.name.endswith(end):
                schedules.append(parse(full, path.read_text(), beside.read_text()))
                break
    return schedules


def _bare(name: str) -> str:
    return re.sub(r"\.\d+$", "", name)


def clear(dump: str | Path) -> None:
    """Removes the files of a dump: the compiler writes tens of megabytes a program."""
    for path in Path(dump).glob("*.txt"):
        path.unlink()


def record(dump: str | Path, chip: str, function: Callable[..., Any], *arguments: Any):
    """Compiles in this process, which called ``aot.prepare(dump)`` before anything else.

    What lay in the folder is removed before and after.

    Args:
      dump: the folder that ``aot.prepare`` was told.
      chip, function, arguments: as for ``aot.compile_for``.

    Returns:
      ``(compiled, schedules)``.

    Raises:
      RuntimeError: if the compiler wrote nothing: ``aot.prepare`` came too late.
    """
    from pallas_kernels import aot

    clear(dump)
    compiled = aot.compile_for(chip, function, *arguments)
    schedules = collect(dump)
    clear(dump)
    if not schedules:
        raise RuntimeError(
            f"the compiler wrote no schedule to {dump}: call aot.prepare({str(dump)!r}) before "
            "anything that loads libtpu, or use schedule.measure, which starts a process"
        )
    return compiled, schedules


def measure(chip: str, build: str | Callable[..., Any], *arguments: Any) -> list[Schedule]:
    """Compiles in a fresh process and returns its schedules.

    Args:
      chip: a key of ``CHIPS``.
      build: a function of a module, or ``"module:name"``; called in the new process with
        ``arguments``, it returns ``(function, shapes)`` for ``aot.compile_for``.
      arguments: what pickle can carry.

    Raises:
      ValueError: for a function that another process cannot import.
      RuntimeError: with the end of the compiler's message, if it fails.
    """
    if callable(build):
        if build.__module__ == "__main__" or "<" in build.__qualname__:
            raise ValueError(f"{build.__qualname__} must be a function of an importable module")
        build = f"{build.__module__}:{build.__qualname__}"
    with tempfile.TemporaryDirectory() as folder:
        call, answer = Path(folder, "call"), Path(folder, "answer")
        call.write_bytes(pickle.dumps((chip, build, arguments)))
        command = [sys.executable, "-m", "pallas_kernels.schedule", "--measure", str(folder)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": ""}
        ended = subprocess.run(command, capture_output=True, text=True, env=environment)
        if ended.returncode or not answer.exists():
            raise RuntimeError(f"{build} on {chip}: {ended.stderr[-3000:]}")
        return pickle.loads(answer.read_bytes())


def _measure_here(folder: str) -> None:
    from pallas_kernels import aot, schedule  # this file's own classes, not those of __main__

    chip, build, arguments = pickle.loads(Path(folder, "call").read_bytes())
    aot.prepare(folder)
    module, name = build.split(":")
    function, shapes = getattr(importlib.import_module(module), name)(*arguments)
    _, schedules = schedule.record(folder, chip, function, *shapes)
    Path(folder, "answer").write_bytes(pickle.dumps(schedules))


def describe(schedule: Schedule) -> str:
    """A few lines: bundles, slot use and spills of the whole and of each loop."""

    def line(title: str, u: Usage) -> str:
        return (
            f"{title:<34} bundles {u.bundles:>6} (empty {u.empty:>4})  MXU {u.used[MXU]:>5}"
            f" = {u.occupancy(MXU):4.0%}  VALU {u.occupancy(VALU):4.0%}"
            f"  VLOAD {u.occupancy(LOAD):4.0%}  VSTORE {u.occupancy(STORE):4.0%}"
            f"  fill {u.used[FILL]}  spill {u.used[SPILL]}"
        )

    lines = [line(schedule.name, schedule.usage)]
    for i, loop in enumerate(schedule.loops):
        title = f"{'  ' * loop.depth}loop {i} x {loop.trips or '?'}"
        lines.append(line(f"{title} [{loop.start:#x}, {loop.end:#x})", loop.usage))
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """The command line: ``FOLDER [name]``."""
    if len(arguments) == 2 and arguments[0] == "--measure":
        _measure_here(arguments[1])
    elif not arguments or arguments[0].startswith("-"):
        print(__doc__)
    else:
        found = collect(*arguments[:2]) if os.path.isdir(arguments[0]) else []
        if not found:
            print(f"no schedules in {arguments[0]}", file=sys.stderr)
            return 1
        print("\n".join(map(describe, found)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
