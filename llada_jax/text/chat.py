"""Chat templates: from messages to the text that the model was trained to continue."""

from __future__ import annotations

import datetime
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.sandbox

from llada_jax.text.messages import ChatError, check_messages, check_tools
from llada_jax.text.protocol import Tokenizer
from llada_jax.text.special import TOKENIZER_CONFIG, content, read_json

_DEFAULT = "default"
_WITH_TOOLS = "tool_use"  # of several named templates, the one for requests with tools


class ChatTemplate:
    """A Jinja template that renders a conversation, as Hugging Face's tokenizers do.

    Templates come with the weights, from strangers: they run in a sandbox that gives them no
    access to Python's internals and lets them change nothing.

    Args:
      source: the template, or several by name; ``"tool_use"`` then serves requests with tools,
        ``"default"`` the others.
      variables: what the template may use beside the messages, such as ``eos_token``.
      origin: where the template comes from, for messages.

    Raises:
      ChatError: if a template is not valid Jinja, or no default is among several.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        *,
        variables: Mapping[str, Any] | None = None,
        origin: str = "the chat template",
    ):
        sources = {_DEFAULT: source} if isinstance(source, str) else dict(source)
        if _DEFAULT not in sources:
            raise ChatError(f"{origin}: none of the templates is named {_DEFAULT!r}; name one so")
        self._origin = origin
        self._variables = dict(variables or {})
        environment = _environment()
        try:
            self._templates = {
                name: environment.from_string(text) for name, text in sources.items()
            }
        except jinja2.TemplateSyntaxError as error:
            raise ChatError(f"{origin}, line {error.lineno}: {error.message}") from error

    @classmethod
    def llada2(cls) -> ChatTemplate:
        """LLaDA2.x's format, equal to the template of the released models."""
        source = importlib.resources.files("llada_jax.text").joinpath("llada2.jinja")
        return cls(source.read_text(encoding="utf-8"), origin="llada2.jinja")

    @classmethod
    def from_folder(cls, folder: str | Path, tokenizer: Tokenizer | None = None) -> ChatTemplate:
        """The template of a model folder: ``chat_template.jinja``, or ``tokenizer_config.json``.

        Args:
          folder: a model folder.
          tokenizer: the folder's; if there is no template, but ``<role>`` is one of its tokens,
            the format is LLaDA2's.

        Raises:
          ChatError: if there is no template, or a broken one.
          TokenizerError: if ``tokenizer_config.json`` is broken.
        """
        folder = Path(folder)
        config_file = folder / TOKENIZER_CONFIG
        config = read_json(config_file) if config_file.is_file() else {}
        tokens = {key: content(value) for key, value in config.items() if key.endswith("_token")}
        variables = {key: name for key, name in tokens.items() if name is not None}
        jinja_file = folder / "chat_template.jinja"
        if jinja_file.is_file():
            try:
                source = jinja_file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ChatError(f"{jinja_file} cannot be read: {error}") from error
            return cls(source, variables=variables, origin=str(jinja_file))
        if config.get("chat_template") is not None:
            origin = f"chat_template in {config_file}"
            return cls(
                _sources(config["chat_template"], origin), variables=variables, origin=origin
            )
        if tokenizer is not None and _has_role_token(tokenizer):
            return cls.llada2()
        raise ChatError(
            f"{folder} has no chat template: use generate() with a plain prompt, or add a "
            "chat_template.jinja to the folder"
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """Turns a conversation into text.

        Args:
          messages: see ``check_messages``.
          tools: JSON schemas of the functions that the model may call.
          add_generation_prompt: end with the beginning of an assistant's turn.
          **extra: further variables that the template knows.

        Raises:
          ChatError: if a message is malformed, or the template fails on them or refuses them.
        """
        check_messages(messages)
        check_tools(tools)
        name = _WITH_TOOLS if tools and _WITH_TOOLS in self._templates else _DEFAULT
        given = {"tools": tools or None, "add_generation_prompt": add_generation_prompt}
        variables = {**self._variables, **extra, **given, "messages": messages}
        try:
            return self._templates[name].render(variables)
        except _Refused as error:
            raise ChatError(f"{self._origin} refuses these messages: {error}") from error
        except jinja2.exceptions.SecurityError as error:
            raise ChatError(f"{self._origin} tries to leave its sandbox: {error}") from error
        except Exception as error:  # a template can fail in any way that Python code can
            raise ChatError(
                f"{self._origin} fails on these messages: {type(error).__name__}: {error}"
            ) from error


class _Refused(jinja2.TemplateError):
    """The template called ``raise_exception``."""


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox prints nothing for a forbidden attribute; this one says so."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise jinja2.exceptions.SecurityError(
            f"{attribute!r} of a {type(obj).__name__} must not be used"
        )


def _environment() -> _Sandbox:
    """The environment that published chat templates are written for."""
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own ``tojson`` escapes for HTML; a prompt must read as JSON."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=tuple(separators) if separators else None,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> None:
    raise _Refused(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _has_role_token(tokenizer: Tokenizer) -> bool:
    return [tokenizer.token_text(token) for token in tokenizer.encode("<role>")] == ["<role>"]


def _sources(entry: Any, origin: str) -> dict[str, str]:
    """Templates by name, from a string or a list of ``{"name": …, "template": …}``."""
    if isinstance(entry, str):
        return {_DEFAULT: entry}
    listed = entry if isinstance(entry, list) else [entry]
    found = {}
    for item in listed:
        pair = (item.get("name"), item.get("template")) if isinstance(item, Mapping) else ()
        if len(pair) != 2 or not all(isinstance(value, str) for value in pair):
            raise ChatError(
                f"{origin} must be a string, or a list of objects with name and template"
            )
        found[pair[0]] = pair[1]
    return found
