"""Reading the compiler's schedules, on two recorded dumps; needs no libtpu."""

from pathlib import Path

import pytest

from pallas_kernels import schedule

# probe: one product in a grid, v5e. nest: two loops within a grid of three, v6e.
DUMP = Path(__file__).parent / "schedules"


def one(name):
    (found,) = schedule.collect(DUMP, name)
    return found


def test_a_grid_is_one_loop():
    probe = one("probe")
    assert probe.name == "probe.1"
    assert (probe.usage.bundles, probe.usage.empty) == (134, 14)
    assert probe.usage.used["MXU"] == 72
    assert probe.usage.capacity["MXU"] == 4
    (loop,) = probe.loops
    assert (loop.start, loop.end, loop.depth, loop.parent) == (0xA, 0x82, 1, None)
    assert loop.usage == loop.own == probe.inner
    assert probe.outside.bundles + loop.usage.bundles == 134
    assert probe.inner.occupancy("MXU") == pytest.approx(72 / (120 * 4))
    assert probe.inner.spill_slots == 0


def test_loops_in_loops():
    nest = one("nest.1")
    assert [(x.start, x.end, x.depth, x.parent) for x in nest.loops] == [
        (0x6, 0x89, 1, None),
        (0x3C, 0x74, 2, 0),
        (0x44, 0x72, 3, 1),
    ]
    assert nest.inner == nest.loops[2].usage
    parts = [nest.outside, *(x.own for x in nest.loops)]
    assert sum(u.bundles for u in parts) == nest.usage.bundles == 141
    for slot, used in nest.usage.used.items():
        assert sum(u.used[slot] for u in parts) == used


def test_bundles_times_trips():
    nest = one("nest")
    grid, outer, inner = (x.own.bundles for x in nest.loops)
    expected = nest.outside.bundles + 3 * (grid + 4 * (outer + 5 * inner))
    assert nest.run([3, 4, 5]) == expected
    assert nest.run([1, 1, 1]) == 141
    probe = one("probe")
    assert probe.run(16) == 14 + 16 * 120
    with pytest.raises(ValueError, match="3 loops, got 1 trip counts"):
        nest.run(16)


def test_the_grid():
    text = "\niteration_bounds: (8, 2147483647)\n"
    found = schedule.parse(
        "k", "     0   :  { %1 = smov 0 }" + text, rows_of("0 0 0 0 0 0 0 0 0 0")
    )
    assert found.grid == (8, schedule.DYNAMIC)
    assert one("probe").grid is None  # the recorded dump keeps the bundles alone


def test_collects_in_order_and_describes():
    assert [s.name for s in schedule.collect(DUMP)] == ["probe.1", "nest.1"]
    assert schedule.collect(DUMP, "nes") == []
    text = schedule.describe(one("nest"))
    assert len(text.splitlines()) == 4
    assert "MXU" in text


def write(tmp_path, bundles, rows, capacity="4 3 4 2 1 3 3 1 1 2"):
    (tmp_path / "17-my<kernel>.1-71-final_bundles.txt").write_text(bundles)
    rows = rows_of(rows, capacity)
    (tmp_path / "17-my<kernel>.1-9-final_hlo-static-per-bundle-utilization.txt").write_text(rows)


def rows_of(rows, capacity="4 3 4 2 1 3 3 1 1 2"):
    slots = "MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"
    return f"== CAPACTIY:\n{slots}\n{capacity}\n== UTILIZATION:\n{rows}"


def test_spills_and_shared_body(tmp_path):
    """Two loops may begin at the same bundle; fills and spills are counted where they stand."""
    bundles = (
        "     0   :  { %1 = smov 0 }\n"
        "   0x1 LB: >> { %2 = vst [vmem:[#allocation2_spill]] %v1 }\n"
        "   0x2   : >> { %3 = sld [smem:[#allocation9_spill]] }\n"
        "   0x3   :  {}\n"
        "   0x4   : > { %4 = sbr.rel target = $region1 }\n"
        "   0x5   :  { %5 = sadd 1 }\n"
    )
    row = "0 0 0 0 0 0 {} 0 {} 0\n"
    write(tmp_path, bundles, "".join(row.format(*x) for x in ["00", "01", "20", "00", "00", "00"]))
    (found,) = schedule.collect(tmp_path)
    assert [(x.start, x.end, x.depth) for x in found.loops] == [(1, 5, 1), (1, 4, 2)]
    assert found.loops[1].usage.spill_slots == 3
    assert found.loops[0].own.bundles == 1
    assert found.usage.empty == 1
    assert found.scalar_spills == 2
    assert found.outside.bundles == 2


def test_a_mismatched_dump_is_refused(tmp_path):
    write(tmp_path, "     0   :  { %1 = smov 0 }\n", "")
    with pytest.raises(ValueError, match="1 bundles but 0 rows"):
        schedule.collect(tmp_path)
    write(tmp_path, "     0   :  { %1 = smov 0 }\n", "", capacity="")
    with pytest.raises(ValueError, match="my<kernel>"):
        schedule.collect(tmp_path)


def test_clear(tmp_path):
    write(tmp_path, "     0   :  { %1 = smov 0 }\n", "0 0 0 0 0 0 0 0 0 0\n")
    assert len(schedule.collect(tmp_path, "my<kernel>")) == 1
    schedule.clear(tmp_path)
    assert schedule.collect(tmp_path) == []


def test_measure_needs_an_importable_function():
    with pytest.raises(ValueError, match="importable module"):
        schedule.measure("v5e", lambda: None)
