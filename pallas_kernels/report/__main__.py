"""``python -m pallas_kernels.report [--json | --markdown] [--chip ...] [--kernel ...]``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from pallas_kernels.chips import CHIPS


def main(arguments: list[str] | None = None) -> int:
    """Compiles everything, prints figures; progress goes to stderr."""
    from pallas_kernels.report.measure import KERNELS

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
    args = parser.parse_args(arguments)

    os.environ["JAX_PLATFORMS"] = "cpu"  # the compiler needs no chip
    from pallas_kernels import aot
    from pallas_kernels.report import table
    from pallas_kernels.report.entry import Entry
    from pallas_kernels.report.measure import entries

    began = time.monotonic()

    def log(text: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {text}", file=sys.stderr, flush=True)

    if args.recorded is not None:
        recorded = map(Entry.from_dict, json.loads(args.recorded.read_text()))
        found = [e for e in recorded if e.kernel in args.kernel and e.chip in args.chip]
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
        print(json.dumps([entry.as_dict() for entry in found], indent=1))
        return 0
    text = table.markdown(found)
    if args.into is not None:
        args.into.write_text(table.insert(args.into.read_text(), text))
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
