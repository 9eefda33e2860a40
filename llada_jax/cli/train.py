"""Train: continual pre-training and fine-tuning, resumed by the same command.

llada-jax train nano
llada-jax train configs/train/sft.yaml model.model_path=FOLDER data.train_path=chats.jsonl
llada-jax train sft data.train_path=chats.jsonl train.lr=2e-5 train.max_steps=100 --json
"""

from __future__ import annotations

import argparse
import dataclasses

from rich.console import Console

from llada_jax.cli.output import print_json

_STOPPED = 143  # what a shell reports for a program that SIGTERM ended


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A configuration and what to change in it."""
    parser.add_argument("config", help="a YAML file, or nano, sft, cpt (configs/train)")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings to change"
    )
    parser.add_argument("--show", action="store_true", help="print the resolved settings and leave")
    parser.add_argument("--json", action="store_true", help="print the outcome as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Trains; 143 if a signal ended it early (the same command goes on)."""
    from llada_jax.training import load_run_config, train

    config = load_run_config(args.config, args.overrides)
    if args.show:
        import yaml

        print(yaml.safe_dump(config.to_mapping(), sort_keys=False), end="")
        return 0
    result = train(config)
    if args.json:
        print_json(dataclasses.asdict(result) | {"folder": str(result.folder)})
    else:
        console = Console(highlight=False, soft_wrap=True)
        if result.finished:
            model = result.folder / "hf"
            where = f"the model is in {model}" if model.is_dir() else "no model was exported"
            console.print(f"{result.step} steps done; {where}")
        else:
            console.print(f"stopped after step {result.step}; the same command goes on")
    return 0 if result.finished else _STOPPED
