"""What the compiler says about a whole XLA program: bundles, estimated cycles, HBM bytes.

The instructions of the entry computation run one after another. Each fusion has a schedule of its
own, whose loop is run once for every window that XLA cut its output into; the windows stand in the
program's text (``iteration_bounds``), and so does XLA's own estimate (``estimated_cycles``).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from pallas_kernels.schedule import DYNAMIC, MXU, Schedule

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_BOUNDS = re.compile(r'"iteration_bounds":\[([^\]]*)\]')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
# They move nothing, or what they move is counted at their other half.
_MOVES_NOTHING = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "partition-id")
_FREE = frozenset((*_MOVES_NOTHING, "copy-done", "slice-done", "async-done", "after-all"))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One scheduled instruction of a program.

    Attributes:
      name: as in the dump.
      opcode: of HLO.
      trips: windows of a fusion; ``None`` where the text does not say.
      cycles: XLA's estimate; ``None`` where it makes none.
      hbm_bytes: of its operands and results that lie in HBM, each counted once.
    """

    name: str
    opcode: str
    trips: int | None
    cycles: int | None
    hbm_bytes: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a program costs by its schedules.

    Attributes:
      bundles: over all instructions, static bundles times trips.
      cycles: XLA's estimates added up, where it makes them (not for Pallas kernels).
      mxu_occupancy: of the loop that issues the most MXU instructions, trips counted.
      spill_slots: in the loops of all instructions, static.
      hbm_bytes: moved between HBM and the core.
      uncounted: instructions whose trips are unknown, counted as one.
    """

    bundles: float
    cycles: int
    mxu_occupancy: float
    spill_slots: int
    hbm_bytes: int
    uncounted: tuple[str, ...]


def instructions(text: str) -> list[Instruction]:
    """The entry computation of ``compiled.as_text()``, in its order.

    Raises:
      ValueError: if it holds a while loop, whose trips are not read here, or no entry.
    """
    _, entry, body = text.partition("\nENTRY ")
    if not entry:
        raise ValueError("the program's text has no ENTRY computation")
    sizes: dict[str, int] = {}
    found = []
    for line in body.splitlines():
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        name, rest = match[1], match[2]
        kind, opcode, operands = _split(rest)
        if opcode in ("while", "conditional", "call"):
            raise ValueError(f"{name}: cannot count the trips of a {opcode} in a compiled program")
        sizes[name] = hbm_size(kind)
        if opcode in _FREE:
            continue
        if opcode in ("copy-start", "slice-start"):  # (destination, source, ...): what is moved
            moved = [hbm_size(shape[0]) for shape in _shapes(kind)]
            source = sum(sizes.get(o, 0) for o in operands[:1])
            found.append(Instruction(name, opcode, 1, None, moved[0] + (source and max(moved))))
            continue
        moved = sizes[name] + sum(sizes.get(operand, 0) for operand in set(operands))
        bounds, cycles = _BOUNDS.search(rest), _CYCLES.search(rest)
        trips = math.prod(int(n) for n in re.findall(r"\d+", bounds[1])) if bounds else None
        found.append(Instruction(name, opcode, trips, int(cycles[1]) if cycles else None, moved))
    return found


def cost(
    text: str,
    schedules: Sequence[Schedule],
    trips: Mapping[str, int | float] | None = None,
    hbm_bytes: Mapping[str, int | float] | None = None,
) -> Cost:
    """Adds up a program.

    Args:
      text: ``compiled.as_text()``.
      schedules: of its instructions (``schedule.record``).
      trips: what a Pallas kernel's dynamic grid dimension comes to, by the beginning of its name.
      hbm_bytes: what such a kernel moves, likewise; by default each operand and result once.
    """
    by_name = {s.name: s for s in schedules}
    bundles, cycles, spills, moved = 0.0, 0, 0, 0
    most, occupancy, uncounted = 0.0, 0.0, []
    for it in instructions(text):
        moved += int(_named(hbm_bytes, it.name) or it.hbm_bytes)
        cycles += it.cycles or 0
        schedule = by_name.get(it.name)
        if schedule is None:
            continue  # a copy by the DMA engine issues no bundles
        count = _trips(it, schedule.grid, _named(trips, it.name))
        if count is None:
            count = 1
            if schedule.loops:
                uncounted.append(it.name)
        outer = [count if loop.depth == 1 else 1 for loop in schedule.loops]
        bundles += schedule.run(outer)
        spills += schedule.usage.spill_slots
        issued = count * schedule.inner.used[MXU]
        if issued > most:
            most, occupancy = issued, schedule.inner.occupancy(MXU)
    return Cost(bundles, cycles, occupancy, spills, moved, tuple(uncounted))


def _trips(
    it: Instruction, grid: tuple[int, ...] | None, dynamic: int | float | None
) -> int | float | None:
    """The schedule's own grid if it has one: that is what one of two cores walks."""
    if grid is None or (it.trips is None and it.opcode != "custom-call"):
        return it.trips
    count = 1.0
    for size in grid:
        if size == DYNAMIC and dynamic is None:
            return None
        count *= dynamic if size == DYNAMIC and dynamic is not None else size
    # Copies within a fusion have grids too; its windows are all of them, or one core's share.
    return count if it.trips in (None, count, 2 * count) else it.trips


def hbm_size(kind: str) -> int:
    """Bytes of a type in HLO text that lie in HBM: parts with a layout ``S(n)`` do not."""
    return sum(size for _, size in _shapes(kind))


def _shapes(kind: str) -> list[tuple[str, int]]:
    found = []
    for match in _SHAPE.finditer(kind):
        dtype, dims, layout = match[1], match[2], match[3] or ""
        bits = _BITS.get(dtype)
        if bits is None:
            digits = re.match(r"[a-z]+(\d+)", dtype)
            bits = int(digits[1]) if digits else 0
        size = math.prod(int(n) for n in dims.split(",") if n) * bits // 8
        found.append((match[0], 0 if re.search(r"S\(\d", layout) else size))
    return found


def _split(rest: str) -> tuple[str, str, list[str]]:
    """``type opcode(%a, %b), ...`` to its parts; a tuple's type is in parentheses."""
    depth, space = 0, len(rest)
    for i, letter in enumerate(rest):
        depth += (letter in "({[") - (letter in ")}]")
        if letter == " " and depth == 0:
            space = i
            break
    kind, call = rest[:space], rest[space + 1 :]
    opcode, _, tail = call.partition("(")
    depth, end = 1, len(tail)
    for j, letter in enumerate(tail):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            end = j
            break
    return kind, opcode, re.findall(r"%([\w.\-]+)", tail[:end])


def _named(values: Mapping[str, int | float] | None, name: str) -> int | float | None:
    return next((v for k, v in (values or {}).items() if name.startswith(k)), None)
