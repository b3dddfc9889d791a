"""What a person sees: at 80 columns, in a log, and where the terminal has no UTF-8."""

import io
import time

import pytest

from peftune.errors import EXIT_KEYBOARD, guarded
from peftune.observe import display as module
from peftune.observe.display import Display, Piece

SCORES = {"split": "validation", "step": 120, "epoch": 1.0, "loss": 1.25, "accuracy": 0.875, "macro_f1": 0.75,
          "matthews_correlation": 0.5}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def narrow(monkeypatch):
    """A terminal of 58 columns without colours or moving lines to look past."""
    for name, value in {"COLUMNS": "58", "TERM": "xterm", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    return Terminal()


def test_a_terminal_breaks_scores_between_them_and_not_within_them(narrow):
    Display(stream=narrow).row(SCORES)
    assert [line.rstrip() for line in narrow.getvalue().splitlines()] == [
        "step    120  validation: loss 1.2500  accuracy 0.8750",
        "          macro_f1 0.7500  matthews_correlation 0.5000"]


def test_a_log_keeps_a_row_on_one_line_without_escape_codes():
    log = io.StringIO()
    display = Display(stream=log)
    display.row(SCORES)
    display.table("scores", ["", "value"], [["loss", "1.0"]])
    assert log.getvalue().splitlines()[0].endswith("macro_f1 0.7500  matthews_correlation 0.5000")
    assert "\x1b" not in log.getvalue()


def test_a_stream_without_utf_8_gets_ascii_drawings():
    raw = io.BytesIO()
    display = Display(stream=io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    display.table("scores", ["", "value"], [["loss", "1.0"]])
    display.bars("lengths", ["1 - 2", "3 - 4"], [100, 1])
    display.pieces([Piece("learned", True)])
    assert "+" in raw.getvalue().decode("ascii") and "<<learned>>" in raw.getvalue().decode("ascii")


def test_a_letter_that_standard_output_cannot_show_ends_nothing(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    assert guarded(lambda _: Display().warn("the label 'schön'") or 0, []) == 0
    assert rb"sch\xf6n" in raw.getvalue()


def test_a_log_hears_from_a_long_phase_and_a_long_evaluation(monkeypatch):
    monkeypatch.setattr(module, "LONG_S", 0.02)
    log = io.StringIO()
    display = Display(stream=log)
    with display.phase("untrained") as notes:
        display.progress("validation", 1, 4)
        time.sleep(0.1)
        notes.append("done")
    for done in range(1, 5):
        display.progress("test", done, 4)
        time.sleep(0.03)
    said = log.getvalue()
    assert "untrained: 0 s so far, validation 1 of 4" in said and "test 3 of 4" in said and "test 4 of 4" not in said


def test_of_an_unknown_number_only_what_is_done_is_said(monkeypatch):
    monkeypatch.setattr(module, "LONG_S", 0.02)
    log = io.StringIO()
    display = Display(stream=log)
    with display.phase("data"):
        display.progress("train rows read", 120_000, 0)
        while not log.getvalue():
            time.sleep(0.01)
    assert "data: 0 s so far, train rows read 120,000\n" in log.getvalue()


def test_the_keyboard_ends_a_command_without_a_trace(capsys):
    def door(arguments):
        raise KeyboardInterrupt

    assert guarded(door, []) == EXIT_KEYBOARD
    assert capsys.readouterr().err == "stopped from the keyboard\n"


def test_a_terminal_indents_what_it_breaks_as_the_line_began(narrow):
    Display(stream=narrow).warn("8 rows\n      " + "words and " * 9)
    first, *broken = narrow.getvalue().splitlines()
    assert first == "note: 8 rows" and len(broken) > 1
    assert all(line.startswith(("      w", "      and")) for line in broken)
