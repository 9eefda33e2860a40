"""The report's arithmetic, without libtpu."""

import dataclasses
import json

import numpy as np
import pytest

from pallas_kernels import schedule
from pallas_kernels.report import measure, ours, program, stock, table, work
from pallas_kernels.report.__main__ import main
from pallas_kernels.report.call import Call
from pallas_kernels.report.entry import Entry

HLO = """HloModule jit_f, is_scheduled=true

%fused_computation (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
}

ENTRY %main.2 (x.1: bf16[256,128], w.1: bf16[128,512]) -> (f32[256,512], s32[]) {
  %x.1 = bf16[256,128]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="x"}
  %w.1 = bf16[128,512]{1,0:T(8,128)(2,1)} parameter(1)
  %copy-start = (bf16[256,128]{1,0:T(8,128)(2,1)S(1)}, bf16[256,128]{1,0}, u32[]{:S(2)}) copy-start(%x.1), cross_program_prefetch_index=0
  %copy-done = bf16[256,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %fusion.6 = f32[256,512]{1,0:T(8,128)} fusion(%copy-done, %w.1), kind=kOutput, calls=%fused_computation, backend_config={"window_config":{"estimated_cycles":"1000","iteration_bounds":["4","1","2"]}}
  %call.1 = s32[]{:T(128)S(6)} custom-call(%fusion.6), custom_call_target="tpu_custom_call"
  ROOT %tuple.3 = (f32[256,512]{1,0:T(8,128)}, s32[]{:T(128)S(6)}) tuple(%fusion.6, %call.1)
}
"""  # noqa: E501


def usage(bundles, mxu=0, spills=0):
    used = {"MXU": mxu, "VLOAD:FILL": spills, "VSTORE:SPILL": 0}
    return schedule.Usage(bundles, 0, used, {"MXU": 4, "VLOAD:FILL": 1, "VSTORE:SPILL": 1})


def scheduled(name, *loops, outside=10, grid=None):
    """Loops: ``(depth, parent, own bundles, mxu, trips)``; an outer loop holds the inner ones."""
    found = []
    for i, (depth, parent, own, mxu, trips) in enumerate(loops):
        inside = {i}
        for k, other in enumerate(loops):
            inside |= {k} if other[1] in inside else set()
        inner = [loops[k] for k in inside - {i}]
        whole = usage(own + sum(x[2] for x in inner), mxu + sum(x[3] for x in inner))
        found.append(schedule.Loop(0, 1, depth, parent, whole, usage(own, mxu), trips))
    total = usage(outside + sum(x[2] for x in loops), sum(x[3] for x in loops), 3)
    return schedule.Schedule(name, total, usage(outside), tuple(found), 0, grid)


def test_instructions_of_a_program():
    copy, fusion, call = program.instructions(HLO)
    assert copy.name == "copy-start"
    assert copy.hbm_bytes == 256 * 128 * 2  # into VMEM: read once
    assert (fusion.name, fusion.opcode, fusion.trips, fusion.cycles) == (
        "fusion.6",
        "fusion",
        8,
        1000,
    )
    assert fusion.hbm_bytes == 256 * 512 * 4 + 128 * 512 * 2  # x lies in VMEM
    assert call.trips is None
    with pytest.raises(ValueError, match="no ENTRY"):
        program.instructions("nothing")
    with pytest.raises(ValueError, match="trips of a while"):
        program.instructions(HLO.replace("custom-call(", "while("))


def test_cost_of_a_program():
    parts = [
        scheduled("fusion.6", (1, None, 100, 200, None)),
        scheduled("call.1", (1, None, 50, 20, None), grid=(2, schedule.DYNAMIC)),
    ]
    found = program.cost(HLO, parts, {"call": 30})
    assert found.bundles == (10 + 8 * 100) + (10 + 2 * 30 * 50)
    assert found.cycles == 1000
    assert found.mxu_occupancy == pytest.approx(200 / 400)
    assert found.spill_slots == 6
    assert found.uncounted == ()
    unknown = program.cost(HLO, parts)
    assert unknown.uncounted == ("call.1",)
    assert unknown.bundles == (10 + 8 * 100) + (10 + 50)


def test_two_cores_share_the_windows():
    half = scheduled("fusion.6", (1, None, 100, 200, None), grid=(2, 1, 2))
    assert program.cost(HLO, [half]).bundles == 10 + 4 * 100
    other = scheduled("fusion.6", (1, None, 100, 200, None), grid=(64,))  # some copy's
    assert program.cost(HLO, [other]).bundles == 10 + 8 * 100


def test_trips_from_schedule_and_work():
    kernel = scheduled(
        "k.1",
        (1, None, 5, 0, 12),
        (2, 0, 7, 0, 16),  # clears something in the first step
        (2, 0, 11, 3, None),
        (3, 2, 13, 9, 4),
    )
    trips = ours.loop_trips(kernel, 10, lambda i, _: 2.5)
    assert trips == [10, 1.6, 2.5, 4]
    assert kernel.run(trips) == 10 + 10 * (5 + 1.6 * 7 + 2.5 * (11 + 4 * 13))
    with pytest.raises(ValueError, match="loop 2 is dynamic"):
        ours.loop_trips(kernel, 10)


def test_work():
    model = work.MODELS["mini"]
    experts = work.routing(model, 256)
    assert experts.shape == (256, 8)
    assert all(len(set(row)) == 8 for row in experts.tolist())
    lengths = work.ragged_lengths()
    assert (lengths % 32 == 0).all()
    assert (lengths.min(), lengths.max()) == (512, 4064)
    assert lengths.mean() == pytest.approx((512 + 4064) / 2)


def test_ragged_tiles():
    experts = np.array([[0], [0], [0], [2], [2], [3]])  # rows 0-2, 3-4, 5
    assert stock.ragged_tiles(experts, 4, tile=2) == 2 + 2 + 1
    assert stock.ragged_tiles(experts, 4, tile=8) == 3
    assert stock.ragged_tiles(experts, 4, tile=1) == 6


ENTRY = Entry(
    kernel="block_decode_attention",
    chip="v5e",
    shape="mini",
    bundles=1000,
    mxu_occupancy=0.5,
    spill_slots=0,
    hbm_bytes=819_000_000,
    hbm_bytes_least=800_000_000,
    loops=((10, 100.0),),
    other_spill_slots=0,
    stock="splash",
    stock_bundles=2000,
    stock_cycles=0,
    stock_mxu_occupancy=0.4,
    stock_spill_slots=3,
    stock_hbm_bytes=900_000_000,
)


def test_targets():
    assert ENTRY.misses() == []
    assert ENTRY.dma_bundles() == pytest.approx(1.5e6)
    assert ENTRY.bound_bundles() == pytest.approx(1.5e6)
    worse = dataclasses.replace(
        ENTRY,
        hbm_bytes=900_000_000,
        spill_slots=2,
        stock_bundles=800,
        visited_tiles=120,
        ideal_tiles=100.0,
    )
    assert len(worse.misses()) == 4
    found = json.loads(json.dumps(worse.as_dict()))
    assert Entry.from_dict(found) == worse
    needed = "kernel chip shape bundles stock_bundles mxu_occupancy spill_slots hbm_bytes"
    assert set(needed.split()) | {"hbm_bytes_least", "misses"} <= set(found)


def test_table():
    text = table.markdown([ENTRY, dataclasses.replace(ENTRY, kernel="expert_mlp", spill_slots=2)])
    assert text.count("### ") == 2
    assert "Misses: none." in text
    assert "2 spill slots" in text
    page = f"a\n{table.BEGIN}\nold\n{table.END}\nb\n"
    assert table.insert(page, text) == f"a\n{table.BEGIN}\n\n{text}\n{table.END}\nb\n"
    with pytest.raises(ValueError, match="needs the lines"):
        table.insert("a", text)


CALL = Call("expert_mlp", "v5e", "mini", 8, "int4", 2000, 0.2, 0, 819_000, 819_000, experts=256)


def test_calls():
    assert CALL.dma_bundles() == pytest.approx(1500)
    found = json.loads(json.dumps(CALL.as_dict()))
    assert Call.from_dict(found) == CALL
    assert "cache_length" not in found
    text = table.calls([CALL, dataclasses.replace(CALL, bundles=1000)])
    assert "| v5e | int4 | 8 | 2 k | 2 k | compute |" in text
    assert "| v5e | int4 | 8 | 1 k | 2 k | memory |" in text
    assert table.calls([]) == table.markdown([]) == ""


def test_recorded_calls_and_entries(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    file = tmp_path / "kernels.json"
    file.write_text(json.dumps([CALL.as_dict(), ENTRY.as_dict()]))
    assert main(["--recorded", str(file)]) == 0
    assert capsys.readouterr().out.count("### ") == 2
    assert main(["--recorded", str(file), "--json", "--kernel", "expert_mlp"]) == 0
    assert [Call.from_dict(c) for c in json.loads(capsys.readouterr().out)] == [CALL]


@pytest.mark.parametrize("weights", work.WEIGHTS)
def test_bytes_of_the_experts(weights):
    """bfloat16 twice int8, four times int4, but for scales."""
    model = work.MODELS["mini"]
    subject = ours.expert_mlp(model, "v5e", 1, weights)
    touched = len(np.unique(work.routing(model, model.block)))
    size = {"bfloat16": 2, "int8": 1, "fp8": 1, "int4": 0.5}[weights]
    values = touched * 3 * model.dim * model.ffn * size
    assert values < subject.hbm_bytes < 1.1 * values
    assert subject.hbm_bytes == subject.least_bytes


@pytest.mark.parametrize(("rows", "weights"), [(8, "bfloat16"), (32, "int8")])
def test_trips_of_the_head(rows, weights):
    """Every chunk is noted, only the last one mended; with several chunks int8 is cast first."""
    subject = ours.confidence_head(work.MODELS["mini"], "v5e", rows, weights)
    loops = [(1, None, 5, 0, 12), (2, 0, 7, 0, 32), (2, 0, 11, 9, 4)]
    loops += [(3, 2, 13, 0, 32), (3, 2, 17, 0, 4), (2, 0, 19, 0, rows * 4)]
    if weights == "bfloat16":
        loops[1:2] = []
        loops = [(d, p and 1, *rest) for d, p, *rest in loops]
    trips = subject.trips(scheduled("confidence_head.1", *loops, grid=(1, 1, 10)))
    cast = [32] if weights == "int8" else []
    assert trips == [10, *cast, 4, 3.2, 4, rows * 4 / 10]


def test_trips_of_flashs_head():
    """Its tiles are one chunk: the loops lie in the grid's own."""
    subject = ours.confidence_head(work.MODELS["flash"], "v5e")
    loops = (1, None, 5, 9, 12), (2, 0, 13, 0, 32), (2, 0, 17, 0, 4), (2, 0, 19, 0, 32)
    trips = subject.trips(scheduled("confidence_head.1", *loops, grid=(1, 1, 10)))
    assert trips == [10, 3.2, 4, 3.2]


def test_every_kernel_has_a_measurement():
    assert set(measure._MEASURES) == set(measure.KERNELS)
