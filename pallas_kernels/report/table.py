"""The report as a Markdown table, and its place in a document."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from pallas_kernels.report.call import Call
from pallas_kernels.report.entry import Entry

BEGIN, END = "<!-- kernels report: begin -->", "<!-- kernels report: end -->"

_COLUMNS = (
    ("chip", ""),
    ("work", ""),
    ("bundles", "right"),
    ("stock", "right"),
    ("ratio", "right"),
    ("MXU", "right"),
    ("stock MXU", "right"),
    ("spills", "right"),
    ("stock spills", "right"),
    ("HBM MB", "right"),
    ("least", "right"),
    ("ratio", "right"),
    ("stock MB", "right"),
    ("bound", "right"),
)


def markdown(entries: Sequence[Entry]) -> str:
    """One table a kernel, then the misses in words."""
    lines: list[str] = []
    for kernel, group in itertools.groupby(entries, lambda e: e.kernel):
        rows = list(group)
        tiles = ""
        if rows[0].visited_tiles is not None and rows[0].ideal_tiles:
            ratios = sorted({round(e.visited_tiles / e.ideal_tiles, 2) for e in rows})  # type: ignore[operator]
            tiles = f"; visited / ideal tiles {', '.join(map(str, ratios))}"
        lines += [f"### {kernel}", "", f"Stock: {rows[0].stock}{tiles}.", ""]
        lines.append("| " + " | ".join(name for name, _ in _COLUMNS) + " |")
        lines.append("|" + "|".join("---:" if side else "---" for _, side in _COLUMNS) + "|")
        lines += ["| " + " | ".join(_cells(e)) + " |" for e in rows]
        missed = [f"- {e.chip}, {e.shape}: {'; '.join(e.misses())}." for e in rows if e.misses()]
        lines += ["", *(["Misses:", "", *missed] if missed else ["Misses: none."]), ""]
    return "\n".join(lines).rstrip() + "\n" if lines else ""


def calls(found: Sequence[Call]) -> str:
    """One table a kernel: what a call issues, and what could be issued while its bytes move."""
    lines: list[str] = []
    for kernel, group in itertools.groupby(
        sorted(found, key=lambda c: c.kernel), lambda c: c.kernel
    ):
        lines += [f"### {kernel}", "", "| chip | weights | rows | bundles | DMA bundles | bound |"]
        lines.append("|---|---|---:|---:|---:|---|")
        for c in group:
            bound = "memory" if c.dma_bundles() > c.bundles else "compute"
            cells = c.chip, c.weights, str(c.rows), _short(c.bundles), _short(c.dma_bundles())
            lines.append(f"| {' | '.join(cells)} | {bound} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n" if lines else ""


def _cells(e: Entry) -> list[str]:
    bound = "memory" if e.dma_bundles() > e.bundles else "compute"
    return [
        e.chip,
        e.shape,
        _short(e.bundles),
        _short(e.stock_bundles),
        f"{e.bundles_ratio:.2f}",
        f"{e.mxu_occupancy:.0%}",
        f"{e.stock_mxu_occupancy:.0%}",
        str(e.spill_slots),
        str(e.stock_spill_slots),
        f"{e.hbm_bytes / 1e6:.1f}",
        f"{e.hbm_bytes_least / 1e6:.1f}",
        f"{e.bytes_ratio:.3f}",
        f"{e.stock_hbm_bytes / 1e6:.1f}",
        f"{bound} {_short(e.bound_bundles())} / {_short(e.bound_bundles(stock=True))}",
    ]


def _short(bundles: int | float) -> str:
    return f"{bundles / 1e6:.2f} M" if bundles >= 999500 else f"{bundles / 1e3:.0f} k"


def insert(document: str, table: str) -> str:
    """Replaces what lies between the marker comments.

    Raises:
      ValueError: if the document lacks them.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table}\n{END}{after}"
