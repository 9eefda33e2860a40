"""Recorded generations in a JSON file, to be shown or examined later."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llada_jax.decoding import Phase, Trace, TraceStep
from llada_jax.generation import Generation

FORMAT = "llada_jax.traces"
VERSION = 1


class TraceFileError(ValueError):
    """A file that is no recording; the message names it and the way out."""


def write_traces(
    file: str | os.PathLike[str],
    generations: Sequence[Generation],
    token_texts: Mapping[int, str] | None = None,
) -> None:
    """Writes generations that were made with ``return_trace=True``.

    The file appears complete or not at all. Arrays are lists of numbers, masks of positions are
    lists of places in the step's span:

        {"format": "llada_jax.traces", "version": 1, "token_texts": {"33": "1", …},
         "traces": [{"prompt_token_ids": […], "token_ids": […], "text": "…",
                     "block_length": 32, "mask_token_id": 319, "end": 96,
                     "steps": [{"phase": "DENOISE", "start": 0, "block_index": 0, "before": […],
                                "after": […], "unmasked": […], "edited": […], "proposal": […],
                                "confidence": […]}, …]}, …]}

    Args:
      file: what to write.
      generations: each with its trace.
      token_texts: how tokens appear, for readers without the tokenizer.
    """
    value = {
        "format": FORMAT,
        "version": VERSION,
        "token_texts": {str(token): text for token, text in (token_texts or {}).items()},
        "traces": [_trace_to_json(generation) for generation in generations],
    }
    file = Path(file)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(value), encoding="utf-8")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def read_traces(file: str | os.PathLike[str]) -> list[Trace]:
    """Reads what ``write_traces`` wrote.

    Raises:
      TraceFileError: if the file is something else.
    """
    try:
        value = json.loads(Path(file).read_text(encoding="utf-8"))
        if value["format"] != FORMAT or value["version"] != VERSION:
            raise TraceFileError(
                f"{file} is {value['format']!r}, version {value['version']!r}; this code reads "
                f"{FORMAT!r}, version {VERSION}"
            )
        return [_trace_from_json(trace) for trace in value["traces"]]
    except TraceFileError:
        raise
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise TraceFileError(
            f"{file} is no recording ({type(error).__name__}: {error}); make one with "
            "`llada-jax generate --trace FILE`"
        ) from error


def _trace_to_json(generation: Generation) -> dict[str, Any]:
    trace = generation.trace
    if trace is None:
        raise ValueError("a generation has no trace; set return_trace=True")
    return {
        "prompt_token_ids": list(trace.prompt_token_ids),
        "token_ids": list(generation.token_ids),
        "text": generation.text,
        "block_length": trace.block_length,
        "mask_token_id": trace.mask_token_id,
        "end": trace.end,
        "steps": [_step_to_json(step) for step in trace.steps],
    }


def _step_to_json(step: TraceStep) -> dict[str, Any]:
    return {
        "phase": step.phase.name,
        "start": step.start,
        "block_index": step.block_index,
        "before": step.before.tolist(),
        "after": step.after.tolist(),
        "unmasked": step.unmasked.nonzero()[0].tolist(),
        "edited": step.edited.nonzero()[0].tolist(),
        "proposal": step.proposal.tolist(),
        "confidence": [round(float(c), 6) for c in step.confidence],
    }


def _trace_from_json(value: Mapping[str, Any]) -> Trace:
    return Trace(
        prompt_token_ids=tuple(value["prompt_token_ids"]),
        block_length=value["block_length"],
        mask_token_id=value["mask_token_id"],
        end=value["end"],
        steps=tuple(_step_from_json(step) for step in value["steps"]),
    )


def _step_from_json(value: Mapping[str, Any]) -> TraceStep:
    width = len(value["after"])

    def places(name: str) -> np.ndarray:
        where = np.zeros(width, bool)
        where[np.array(value[name], int)] = True
        return where

    return TraceStep(
        phase=Phase[value["phase"]],
        start=value["start"],
        block_index=value["block_index"],
        before=np.array(value["before"], np.int32),
        after=np.array(value["after"], np.int32),
        unmasked=places("unmasked"),
        edited=places("edited"),
        proposal=np.array(value["proposal"], np.int32),
        confidence=np.array(value["confidence"], np.float32),
    )
