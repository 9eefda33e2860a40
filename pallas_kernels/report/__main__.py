"""``python -m pallas_kernels.report [--json | --markdown] [--chip ...] [--kernel ...]``.

With ``--rows`` or ``--weights`` the kernels of a decode step of mini are compiled for all of these,
without their stock alternatives: what ``llada-jax bench roofline --kernels`` reads.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pallas_kernels.chips import CHIPS


def main(arguments: list[str] | None = None) -> int:
    """Compiles everything, prints figures; progress goes to stderr."""
    from pallas_kernels.report import table
    from pallas_kernels.report.measure import KERNELS
    from pallas_kernels.report.work import ROWS, WEIGHTS

    parser = argparse.ArgumentParser("python -m pallas_kernels.report", description=__doc__)
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="a list of objects")
    shape.add_argument("--markdown", action="store_true", help="tables (the default)")
    parser.add_argument("--into", type=Path, metavar="FILE", help="write the tables into FILE")
    parser.add_argument(
        "--recorded", type=Path, metavar="FILE", help="an earlier --json: compile nothing"
    )
    parser.add_argument("--chip", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument(
        "--rows", nargs="+", type=int, metavar="N", help=f"blocks decoded together ({ROWS})"
    )
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, help="how they are stored")
    args = parser.parse_args(arguments)
    recorded: list[dict[str, Any]] = []
    try:  # before minutes of compiling
        if args.recorded is not None:
            recorded = json.loads(args.recorded.read_text())
            if not isinstance(recorded, list) or not recorded:
                raise ValueError(f"{args.recorded} holds no figures; make it with --json")
        if args.into is not None:
            table.insert(args.into.read_text(), "")
    except (OSError, ValueError) as error:
        parser.error(str(error))

    os.environ["JAX_PLATFORMS"] = "cpu"  # the compiler needs no chip
    from pallas_kernels import aot
    from pallas_kernels.report.call import Call
    from pallas_kernels.report.entry import Entry
    from pallas_kernels.report.measure import calls, entries

    began = time.monotonic()

    def log(text: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {text}", file=sys.stderr, flush=True)

    found: list[Entry | Call]
    if args.recorded is not None:
        found = [
            Call.from_dict(values) if "rows" in values else Entry.from_dict(values)
            for values in recorded
            if values["kernel"] in args.kernel and values["chip"] in args.chip
        ]
    elif args.rows or args.weights:
        rows, weights = args.rows or [ROWS], args.weights or ["bfloat16"]
        with tempfile.TemporaryDirectory() as dump:
            aot.prepare(dump)
            found = [
                call
                for chip in args.chip
                for call in calls(dump, chip, rows, weights, args.kernel, log)
            ]
    else:
        with tempfile.TemporaryDirectory() as dump:
            aot.prepare(dump)
            found = [
                entry
                for kernel in args.kernel
                for chip in args.chip
                for entry in entries(dump, chip, (kernel,), log)
            ]
    if args.json:
        # A call is a line: they are kept in the repository.
        if all(isinstance(one, Call) for one in found):
            print("[\n" + ",\n".join(json.dumps(call.as_dict()) for call in found) + "\n]")
        else:
            print(json.dumps([entry.as_dict() for entry in found], indent=1))
        return 0
    text = table.markdown([e for e in found if isinstance(e, Entry)])
    text += table.calls([call for call in found if isinstance(call, Call)])
    if args.into is not None:
        args.into.write_text(table.insert(args.into.read_text(), text))
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
