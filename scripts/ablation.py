"""What each part of the training recipe buys: five recipes at equal compute, several seeds.

    python scripts/ablation.py runs/ablation            # trains, samples, draws; resumable
    python scripts/ablation.py runs/ablation --table    # prints what is there

Every recipe gets the same floating-point operations: one whose steps cost more makes fewer. Each
trained model answers the same held-out problems at every threshold, with editing and without.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llada_jax import LLM, SamplingParams
from llada_jax.config import ModelConfig
from llada_jax.eval import evaluate
from llada_jax.tasks import make_task
from llada_jax.training import RunConfig, load_run_config, train
from llada_jax.training.flops import flops_per_clean_token
from llada_jax.viz.tradeoff import plot_tradeoff

_OWN_DRAFTS = [{"until": 0.15, "rounds": 1}, {"until": 1.0, "rounds": 2}]
_SHARPENED = [
    {"until": 0.15, "rounds": 1},
    {"until": 0.75, "rounds": 2},
    {"until": 1.0, "rounds": 2, "confidence_beta": 0.05},
]
VARIANTS: dict[str, dict[str, Any]] = {
    "M2T": {"random_edit_rate": 0.0, "edit_loss": 0.0, "keep_loss": 0.0},
    "+ T2T": {"keep_loss": 0.0},
    "+ keep": {},
    "+ MTF": {"phases": _OWN_DRAFTS},
    "+ CAP": {"phases": _SHARPENED},
}
THRESHOLDS = (0.2, 0.35, 0.5, 0.65, 0.8, 0.95)


def run_config(folder: Path, variant: str, seed: int, steps: int) -> RunConfig:
    """The configuration of one run; ``steps`` are those of the cheapest recipe."""
    settings = dict(VARIANTS[variant])
    phases = settings.pop("phases", None)
    overrides = [
        f"train.output_dir={folder}",
        f"train.seed={seed}",
        f"data.shuffle_seed={seed}",
        *(f"diffusion.{name}={value}" for name, value in settings.items()),
    ]
    if phases is not None:
        overrides.append(f"phases={json.dumps(phases)}")
    config = load_run_config("ablation", [*overrides, f"train.max_steps={steps}"])
    base = load_run_config("ablation")
    affordable = steps * _cost(base) / _cost(config)
    return load_run_config("ablation", [*overrides, f"train.max_steps={round(affordable)}"])


def _cost(config: RunConfig) -> float:
    """Operations for each clean token, the mean over the phases."""
    assert config.model.config_path is not None
    model = ModelConfig.from_name(config.model.config_path)
    total, begin = 0.0, 0.0
    for phase in config.phases:
        share, begin = phase.until - begin, phase.until
        total += share * flops_per_clean_token(model, phase.diffusion, config.data.max_seq_len)
    return total


def measure(model: Path, problems: int, seed: int) -> Iterator[dict[str, Any]]:
    """Accuracy and speed of one model over thresholds, with editing (at 0) and without."""
    llm = LLM(model, max_batch_size=128)
    task = make_task("sudoku", 1)
    for threshold in THRESHOLDS:
        for editing in (True, False):
            params = SamplingParams(
                max_tokens=64, threshold=threshold, editing_threshold=0.0 if editing else None
            )
            result = evaluate(llm, task, problems, params, seed=seed)
            yield {
                "threshold": threshold,
                "editing": editing,
                "accuracy": result.accuracy,
                "tokens_per_forward": result.tokens_per_forward,
                "edits_per_token": result.edits_per_token,
            }


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means and standard deviations over seeds, a point for each variant, threshold, editing."""
    points = []
    for variant in VARIANTS:
        for threshold in THRESHOLDS:
            for editing in (True, False):
                same = [
                    r
                    for r in results
                    if (r["variant"], r["threshold"], r["editing"]) == (variant, threshold, editing)
                ]
                if same:
                    point = {"variant": variant, "threshold": threshold, "editing": editing}
                    for name in ("accuracy", "tokens_per_forward", "edits_per_token"):
                        values = [r[name] for r in same]
                        point[name] = statistics.mean(values)
                        point[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
                    points.append(point | {"seeds": len(same)})
    return points


def show(points: list[dict[str, Any]]) -> None:
    """A table: accuracy / tokens a forward."""
    table = Table(title="accuracy in % ± std over seeds / tokens per forward")
    table.add_column("threshold, editing")
    for variant in VARIANTS:
        table.add_column(variant, justify="right")
    for threshold in THRESHOLDS:
        for editing in (True, False):
            cells = []
            for variant in VARIANTS:
                here = [
                    p
                    for p in points
                    if (p["variant"], p["threshold"], p["editing"]) == (variant, threshold, editing)
                ]
                cells.append(
                    f"{100 * here[0]['accuracy']:.1f} ± {100 * here[0]['accuracy_std']:.1f} / "
                    f"{here[0]['tokens_per_forward']:.2f}"
                    if here
                    else ""
                )
            table.add_row(f"{threshold}, {'on' if editing else 'off'}", *cells)
    Console(width=140).print(table)


def main() -> None:
    """Trains what is not trained yet, measures what is not measured yet, draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=1000, help="of the cheapest recipe (1000)")
    parser.add_argument("--problems", type=int, default=256, help="to solve at each point (256)")
    parser.add_argument("--table", action="store_true", help="only print and draw what is there")
    args = parser.parse_args()

    for seed in () if args.table else args.seeds:
        for variant in args.variants:
            name = variant.replace("+ ", "").lower()
            folder = args.folder / f"{name}_{seed}"
            train(run_config(folder, variant, seed, args.steps))
            file = folder / "tradeoff.json"
            if not file.is_file():
                rows = list(measure(folder / "hf", args.problems, seed=0))
                partial = file.with_suffix(".partial")
                partial.write_text(
                    json.dumps([r | {"variant": variant, "seed": seed} for r in rows])
                )
                partial.replace(file)
    results = [
        r for f in sorted(args.folder.glob("*/tradeoff.json")) for r in json.loads(f.read_text())
    ]
    points = summarise(results)
    (args.folder / "ablation.json").write_text(json.dumps(points, indent=1) + "\n")
    show(points)
    title = "4x4 sudoku, five recipes"
    plot_tradeoff(points, args.folder / "ablation", title=title)


if __name__ == "__main__":
    main()
