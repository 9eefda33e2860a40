import io

from rich.console import Console

from llada_jax.decoding import Phase, SamplingParams, Trace
from llada_jax.viz import render_step, replay, watch
from llada_jax.viz.cells import STYLES, Glyphs, State
from tests.viz.conftest import MASK, TableTokenizer, make_step, written

M = MASK
ABC = TableTokenizer("abcdefgh")


def draw(step, prompt=(), tokenizer=ABC, console=None, block_length=8):
    console = console or Console(width=40, color_system=None)
    return render_step(step, prompt, block_length, MASK, tokenizer, console)


def test_every_state_has_its_own_sign_without_colour():
    step = make_step([0, 1, 2, 3, M, M, M, M], [0, 1, 2, 4, 5, M, 6, M])
    text, markers = draw(step, prompt=[0, 1]).plain.split("\n")
    assert text == "abcef░g░"
    assert markers == "·· ~+ +"
    signs = [(t, m) for t, m in zip(text, markers.ljust(8), strict=True)]
    prompt, earlier, edited, filled, masked = (signs[i] for i in (0, 2, 3, 4, 5))
    kinds = {prompt[1], earlier[1] + "text", edited[1], filled[1], masked[1] + masked[0]}
    assert len(kinds) == 5


def test_every_state_has_its_own_style():
    step = make_step([0, 1, 2, 3, M, M, M, M], [0, 1, 2, 4, 5, M, 6, M])
    drawn = draw(step, prompt=[0, 1])
    styles = {drawn.plain[s.start : s.end]: str(s.style) for s in drawn.spans}
    assert styles["ab"] == STYLES[State.PROMPT]
    assert styles["e"] == STYLES[State.EDITED] == "underline #D55E00"
    assert styles["f"] == STYLES[State.FILLED] == "bold #0072B2"
    assert styles["░"] == STYLES[State.MASKED]


def test_legend_explains_all_signs_in_40_columns(plain):
    legend = Glyphs.of(plain()).legend()
    assert legend.plain == "░ masked + filled ~ edited · prompt"
    assert legend.cell_len <= 40


def test_ascii_where_the_console_has_no_more(plain):
    console = plain(encoding="ascii")
    drawn = draw(make_step([0, M], [0, M]), prompt=[0], console=console)
    assert drawn.plain == "a_\n. "[:-1]
    assert Glyphs.of(console).legend().plain.isascii()


def test_line_breaks_are_real_and_show_their_state():
    tokenizer = TableTokenizer(["a", "\n", "b", "\n\n"])
    step = make_step([0, 1, M, M, M, M], [0, 1, 2, 1, 0, M])
    assert draw(step, tokenizer=tokenizer).plain == "a\n\nb↵\n++\na░\n+"


def test_wraps_at_the_width_with_markers_below_each_row():
    step = make_step([M] * 8, [0, 1, 2, 3, 4, 5, 6, 7])
    console = Console(width=3, color_system=None)
    assert draw(step, console=console).plain == "abc\n+++\ndef\n+++\ngh\n++"


def test_wide_characters_keep_markers_aligned():
    tokenizer = TableTokenizer(["你", "a"])
    step = make_step([M, 1, M], [0, 1, 0])
    assert draw(step, tokenizer=tokenizer).plain == "你a你\n++ ++"
    narrow = Console(width=4, color_system=None)
    assert draw(step, tokenizer=tokenizer, console=narrow).plain == "你a\n++\n你\n++"


def test_ids_without_a_tokenizer():
    drawn = draw(make_step([M, M], [17, M]), tokenizer=None)
    assert drawn.plain == "17 ░ \n+++"


def test_model_output_cannot_command_the_terminal():
    texts = ["\x1b[2J", "[bold red]", "[/]", "\x9b1m", "\r", "\t", "\u202e"]
    step = make_step([M] * 7, range(7))
    file = io.StringIO()
    console = Console(file=file, width=80, color_system=None, force_terminal=True)
    console.print(draw(step, tokenizer=TableTokenizer(texts), console=console))
    assert file.getvalue().split("\n")[0] == ("\\x1b[2J[bold red][/]\\x9b1m\\r    \\u202e")


def test_a_prompt_token_that_is_the_mask_is_still_prompt():
    drawn = draw(make_step([M, M], [M, 0]), prompt=[M])
    assert drawn.plain == "<|mask|>a\n········+"


def two_blocks(second_start=4):
    return Trace(
        prompt_token_ids=(0,),
        block_length=4,
        mask_token_id=MASK,
        end=8,
        steps=(
            make_step([0, M, M, M], [0, 1, M, 3]),
            make_step([0, 1, M, 3], [0, 2, 2, 3]),
            make_step([0, 2, 2, 3], [0, 2, 2, 3], phase=Phase.COMMIT),
            make_step([M, M, M, M], [4, 5, 6, 7], start=4, block_index=1),
        ),
    )


def test_replay_to_a_file_prints_a_line_a_forward(plain):
    console = plain()
    replay(two_blocks(), ABC, console)
    assert written(console).splitlines() == [
        "   1  ab░d",
        "   2  accd",
        "      ·~+",
        "   3  efgh",
    ]


def test_replay_can_skip_lines(plain):
    console = plain()
    replay(two_blocks(), ABC, console, every=2)
    assert written(console).splitlines() == ["   1  ab░d", "   3  efgh"]


def terminal(width=40, height=20, no_color=False):
    return Console(
        file=io.StringIO(), width=width, height=height, force_terminal=True, no_color=no_color
    )


def test_replay_on_a_terminal_leaves_the_text_and_no_draft():
    console = terminal(no_color=True)
    replay(two_blocks(), ABC, console, delay=0, num_tokens=6, title="speed")
    output = console.file.getvalue()
    assert "speed, forward 2, block 1" in output
    assert "~" in output
    assert output.rstrip("\n").splitlines()[-1].endswith("accdefg")


def test_replay_ends_at_the_end_of_text():
    console = terminal(no_color=True)
    replay(two_blocks(), TableTokenizer("abcdefgh", eos_token_id=6), console, delay=0)
    assert console.file.getvalue().rstrip("\n").splitlines()[-1].endswith("accdef")


def test_final_rows_scroll_away_and_a_window_stays_live():
    window = make_step(
        [0, 2, 2, 3, 4, 5, 6, 7], [0, 2, 1, 3, 4, 5, 6, 7], block_index=1, phase=Phase.EDIT_WINDOW
    )
    trace = two_blocks()
    trace = Trace(trace.prompt_token_ids, 4, MASK, 8, (*trace.steps, window))
    console = terminal(width=60, no_color=True)
    replay(trace, ABC, console, delay=0)
    output = console.file.getvalue()
    assert "editing earlier blocks" in output
    assert output.rstrip("\n").splitlines()[-1].endswith("acbdefgh")


def test_a_draft_taller_than_the_screen_shows_its_end():
    step = make_step([M] * 32, [0] * 31 + [1])
    trace = Trace((), 32, MASK, 32, (step,))
    console = terminal(width=4, height=8, no_color=True)
    replay(trace, ABC, console, delay=0)
    first_frame = console.file.getvalue().split("░")[0]
    assert (first_frame.count("++++"), "aaab" in first_frame) == (2, True)


def test_watch_equals_generate(llm, plain):
    console = plain()
    params = SamplingParams.speed(max_tokens=80)
    watched = watch(llm, "17,18,19,20,", params, console)
    result = llm.generate("17,18,19,20,", params)[0]
    assert (watched.text, watched.token_ids) == (result.text, result.token_ids)
    assert watched.num_forwards == result.num_forwards
    lines = written(console).splitlines()
    assert lines[0].startswith("   1  17,18,19,20,21,")
    assert lines[-1].startswith("   9  ")


def test_watch_on_a_terminal_ends_with_the_whole_text(llm):
    console = terminal(no_color=True)
    result = watch(llm, "17,18,19,20,", SamplingParams.speed(max_tokens=80), console)
    rows = console.file.getvalue().rstrip("\n").splitlines()
    assert rows[-1].endswith(("17,18,19,20," + result.text)[80:])
    assert any(row.endswith("17,18,19,20," + result.text[:28]) for row in rows)


def test_watch_shows_a_stop_string_cut(llm):
    console = terminal(no_color=True)
    params = SamplingParams.speed(max_tokens=80, stop=",30")
    result = watch(llm, "17,18,19,20,", params, console)
    assert result.text == "21,22,23,24,25,26,27,28,29"
    assert console.file.getvalue().rstrip("\n").splitlines()[-1].endswith("26,27,28,29"[-8:])
