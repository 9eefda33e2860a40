"""``SamplingParams`` on the command line: a flag a field, and ``--set field=value``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from llada_jax.cli.parser import UsageError
from llada_jax.decoding import SamplingParams
from llada_jax.decoding.params import ALIASES, FIELD_NAMES

MODES = ("quality", "speed", "v20")
_MODE_KEYS = ("mode", "decode")
_PREFIX = "sampling_"
_HIDDEN = ("return_trace",)  # --trace sets it
_TEXTS = ("stop",)
_WORDS = {"off": None, "none": None, "null": None, "true": True, "false": False}


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--mode``, ``--set`` and a flag for every field of ``SamplingParams``."""
    group = parser.add_argument_group(
        "sampling", "Fields of SamplingParams; the mode gives those that are not set."
    )
    group.add_argument(
        "--mode", choices=MODES, help="2.1's quality mode (default) or speed mode, or 2.0's rule"
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        dest="assignments",
        help="set a field by name, also by other libraries' names (gen_length=80), or the mode "
        "(decode=speed); repeatable",
    )
    described = _descriptions()
    for field in dataclasses.fields(SamplingParams):
        if field.name in _HIDDEN:
            continue
        options: dict[str, Any] = {
            "dest": _PREFIX + field.name,
            "default": argparse.SUPPRESS,
            "help": described.get(field.name, "").replace("%", "%%"),
        }
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif field.name in _TEXTS:
            group.add_argument(flag, action="append", metavar="TEXT", **options)
        else:
            group.add_argument(flag, metavar="X", **options)


def sampling_params(args: argparse.Namespace, **fields: Any) -> SamplingParams:
    """The parameters that a parsed command line asks for.

    Args:
      args: of a parser that ``add_sampling_arguments`` has seen.
      **fields: further fields; the command line must not set them.

    Raises:
      UsageError: if something is set twice.
      SamplingError: for an unknown field or a value outside its range.
    """
    given = {
        name.removeprefix(_PREFIX): _flag_value(name.removeprefix(_PREFIX), value)
        for name, value in vars(args).items()
        if name.startswith(_PREFIX)
    }
    mode, assigned = parse_assignments(args.assignments)
    if mode is not None and args.mode is not None and mode != args.mode:
        raise UsageError(f"--mode {args.mode} and --set decode={mode} contradict each other")
    for name in assigned:
        if name in given:
            raise UsageError(f"{name} is given twice, by its flag and by --set")
    return SamplingParams.from_mode(mode or args.mode or MODES[0], **given, **assigned, **fields)


def is_assignment(word: str) -> bool:
    """Whether a bare word such as ``decode=speed`` or ``gen_length=80`` is a setting."""
    name, equals, _ = word.partition("=")
    return bool(equals) and name in (*_MODE_KEYS, *FIELD_NAMES, *ALIASES)


def parse_assignments(assignments: Iterable[str]) -> tuple[str | None, dict[str, Any]]:
    """``["decode=speed", "max_tokens=80"]`` as ``("speed", {"max_tokens": 80})``.

    Raises:
      UsageError: for something without ``=``, or a name that occurs twice.
    """
    mode, fields = None, {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise UsageError(f"{assignment!r} must have the form field=value")
        if name in _MODE_KEYS:
            if mode is not None:
                raise UsageError(f"the mode is given twice ({mode} and {text})")
            mode = text.strip()
        elif name in fields:
            raise UsageError(f"{name} is given twice by --set")
        else:
            fields[name] = (text,) if name in _TEXTS else parse_value(name, text)
    return mode, fields


def parse_value(name: str, text: str) -> Any:
    """The value that a word stands for; a word that is no value stays a string.

    ``SamplingParams`` then reports that string as it would any other wrong value.
    """
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if name == "stop_token_ids":
        parts = [part for part in re.split(r"[,\s]+", text.strip("[]() ")) if part]
        return tuple(parse_value("", part) for part in parts)
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def params_summary(params: SamplingParams) -> str:
    """The fields that differ from the defaults, as ``--set`` would take them."""
    parts = []
    for field in dataclasses.fields(params):
        value = getattr(params, field.name)
        if field.name not in _HIDDEN and value != field.default:
            parts.append(f"{field.name}={'off' if value is None else json.dumps(value)}")
    return " ".join(parts) or "the defaults"


def _flag_value(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return parse_value(name, value)
    return tuple(value) if isinstance(value, list) else value


def _descriptions() -> Mapping[str, str]:
    """What the docstring of ``SamplingParams`` says about each field."""
    described: dict[str, str] = {}
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    names: list[str] = []
    for line in (SamplingParams.__doc__ or "").splitlines():
        head = re.match(r" {4,6}([a-z_0-9]+(?:, [a-z_0-9]+)*): (.*)", line)
        if head and set(head[1].split(", ")) <= fields:
            names = head[1].split(", ")
            described |= dict.fromkeys(names, head[2].strip())
        elif names and line.startswith("        "):
            for name in names:
                described[name] += " " + line.strip()
        else:
            names = []
    return {name: text.replace("``", "") for name, text in described.items()}
