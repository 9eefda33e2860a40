"""Chooses a kernel's tile sizes by what the TPU compiler makes of them; needs no TPU.

    python -m pallas_kernels.tune block_diffusion_attention --chip v5e v5p

writes the table ``tuning.json`` of the kernel's folder (needs the ``libtpu`` package).
"""

from __future__ import annotations

import argparse
import importlib

from pallas_kernels.chips import CHIPS

KERNELS = ("block_diffusion_attention",)


def main(arguments: list[str] | None = None) -> None:
    """The command line: a kernel's folder, and chips (all by default)."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tune", description=__doc__)
    parser.add_argument("kernel", choices=KERNELS)
    parser.add_argument("--chip", nargs="+", choices=list(CHIPS), default=list(CHIPS))
    given = parser.parse_args(arguments)
    importlib.import_module(f"pallas_kernels.{given.kernel}.tune").tune(given.chip)


if __name__ == "__main__":
    main()
