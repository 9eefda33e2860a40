"""The terminal view: a draft being filled and edited.

On a terminal the active block is redrawn in place, and text that is final scrolls away above it.
Elsewhere (a file, a pipe) every forward pass prints a line.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from llada_jax.decoding import Phase, SamplingParams, Trace, TraceStep
from llada_jax.generation import Generation
from llada_jax.llm import LLM
from llada_jax.text import Tokenizer
from llada_jax.viz.block_view import BlockView, TextSoFar
from llada_jax.viz.cells import Glyphs, draw_markers, draw_row, one_line, wrap

_DOING = {
    Phase.DENOISE: "",
    Phase.COMMIT: "storing the block",
    Phase.EDIT_WINDOW: "editing earlier blocks",
    Phase.REWRITE_WINDOW: "storing the edited blocks",
}


def render_step(
    step: TraceStep,
    prompt: Sequence[int],
    block_length: int,
    mask_token_id: int,
    tokenizer: Tokenizer | None,
    console: Console,
) -> Text:
    """Draws the span of one forward pass as it left it, with markers below each row.

    Args:
      step: the forward pass.
      prompt: the prompt's token ids; those inside the span appear as such.
      block_length: C.
      mask_token_id: the id that stands for a position not yet filled.
      tokenizer: ``None`` to show token ids.
      console: gives the width and what can be shown.
    """
    view = BlockView(
        prompt, block_length, mask_token_id, tokenizer, console.width, Glyphs.of(console)
    )
    view.step(step)
    view.skip_to(step.start)
    return view.draft()


def watch(
    llm: LLM,
    prompt: str | Sequence[int],
    params: SamplingParams | None = None,
    console: Console | None = None,
    *,
    title: str = "",
) -> Generation:
    """Continues a prompt and shows every forward pass as it happens.

    Args:
      llm: the model.
      prompt: text or token ids.
      params: quality mode by default.
      console: where to draw; the standard output by default.
      title: the first word of the status line.

    Returns:
      The result, as ``LLM.generate`` gives it.
    """
    params = params or SamplingParams()
    events = llm.stream(prompt, params, steps=True)
    if isinstance(prompt, str):
        ids = llm.tokenizer.encode(prompt) if llm.tokenizer is not None else []
    else:
        ids = [int(token) for token in prompt]
    generation = None
    final = len(ids)
    with _Screen(
        console or Console(),
        ids,
        params.block_length,
        llm.config.mask_token_id,
        llm.tokenizer,
        title=title,
    ) as screen:
        for event in events:
            if event.step is not None:
                screen.step(event.step)
            if event.kind != "step":
                final += len(event.token_ids)
                text = event.text
                if llm.tokenizer is None:
                    text = TextSoFar(None).push(event.token_ids)
                screen.finish(final, text)
            generation = event.generation
    assert generation is not None  # a stream ends with its generation
    return generation


def replay(
    trace: Trace,
    tokenizer: Tokenizer | None,
    console: Console | None = None,
    delay: float | int = 0.1,
    *,
    num_tokens: int | None = None,
    title: str = "",
    every: int = 1,
) -> None:
    """Shows a recorded trace.

    Args:
      trace: what ``return_trace`` recorded.
      tokenizer: ``None`` to show token ids.
      console: where to draw; the standard output by default.
      delay: seconds that a forward pass stays on a terminal.
      num_tokens: generated tokens to keep in the end (the canvas has whole blocks).
      title: the first word of the status line.
      every: of the lines that something else than a terminal gets, print one in so many.
    """
    held_back = max((s.block_index - s.start // trace.block_length for s in trace.steps), default=0)
    prompt = trace.prompt_token_ids
    stop = len(prompt) + num_tokens if num_tokens is not None else trace.end
    final, text = len(prompt), TextSoFar(tokenizer)
    with _Screen(
        console or Console(),
        prompt,
        trace.block_length,
        trace.mask_token_id,
        tokenizer,
        title=title,
        every=every,
    ) as screen:
        block = len(prompt) // trace.block_length
        for step in trace.steps:
            if step.block_index > block:
                block = step.block_index
                before = final
                final = max(final, (block - held_back) * trace.block_length)
                screen.finish(final, text.push(screen.view.tokens(before, final)))
            screen.step(step)
            if screen.live:
                time.sleep(delay)
        rest = screen.view.tokens(final, stop)
        ends = [i for i, token in enumerate(rest) if _ends(token, trace, tokenizer)]
        rest = rest[: ends[0]] if ends else rest
        screen.finish(trace.end, text.push(rest) + text.flush())


def _ends(token: int, trace: Trace, tokenizer: Tokenizer | None) -> bool:
    return token == trace.mask_token_id or (
        tokenizer is not None and token == tokenizer.eos_token_id
    )


class _Screen:
    """Draws a ``BlockView``: in place on a terminal, else a line a forward pass."""

    def __init__(
        self,
        console: Console,
        prompt: Sequence[int],
        block_length: int,
        mask_token_id: int,
        tokenizer: Tokenizer | None,
        *,
        title: str = "",
        every: int = 1,
    ):
        self.live = console.is_terminal and not console.is_dumb_terminal
        self._console = console
        self._glyphs = Glyphs.of(console)
        self._title, self._every = title, every
        self._display: Live | None = None
        self.view = BlockView(
            prompt, block_length, mask_token_id, tokenizer, console.width, self._glyphs
        )

    def __enter__(self) -> _Screen:
        if self.live:
            waiting = Spinner("dots", text=Text(" compiling, once for this shape"))
            self._display = Live(
                waiting, console=self._console, transient=True, refresh_per_second=12
            )
            self._display.start()
            self._print(self.view.opening)
        return self

    def __exit__(self, *error: object) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None
            self._print([self.view.rest()])

    def step(self, step: TraceStep) -> None:
        """Shows one forward pass."""
        self.view.step(step)
        if self._display is not None:
            self._display.update(self._frame(step), refresh=True)
        elif step.phase in (Phase.DENOISE, Phase.EDIT_WINDOW) and self._is_due():
            self._print(self._lines(step))

    def finish(self, upto: int, text: str) -> None:
        """Lets final text scroll away; the lines of a file have shown it already."""
        rows = self.view.finish(upto, text)
        if self._display is not None:
            self._print(rows)

    def _is_due(self) -> bool:
        return (self.view.forwards - 1) % self._every == 0

    def _print(self, lines: Sequence[Text]) -> None:
        for line in lines:
            self._console.print(line, end="\n", soft_wrap=True)

    def _frame(self, step: TraceStep) -> RenderableType:
        status = Text(no_wrap=True, overflow="ellipsis", style="bold")
        parts = [
            self._title,
            f"forward {self.view.forwards}",
            f"block {step.block_index + 1}",
            _DOING.get(step.phase, ""),
        ]
        status.append(", ".join(part for part in parts if part))
        draft = self.view.draft(max_rows=max(2, self._console.height - 4))
        return Group(draft, self._glyphs.legend(), status)

    def _lines(self, step: TraceStep) -> list[Text]:
        label = f"{self.view.forwards:4d}  "
        cells = one_line(self.view.cells(), self._glyphs)
        lines = []
        for row in wrap(cells, max(8, self._console.width - len(label)), self._glyphs):
            lines.append(Text(label).append_text(draw_row(row)))
            label = " " * len(label)
            markers = draw_markers(row, self._glyphs)
            if step.edited.any() and markers.plain:
                lines.append(Text(label).append_text(markers))
        return lines
