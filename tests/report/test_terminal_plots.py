"""Plots in the terminal: dots, axes and width."""

import io
import math

import pytest
from report_pages import make_run, row
from rich.console import Console

from openpalm.report import terminal_plots
from openpalm.report.runs import read_runs

WIDTH, HEIGHT = 80, 20


def drawn(*curves, width=WIDTH, height=HEIGHT):
    named = [(f"run{i}", curve) for i, curve in enumerate(curves)]
    text = terminal_plots.plot(named, title="loss", x_label="steps", width=width, height=height)
    return text.plain.splitlines()


def dots(lines):
    """(x, y) of every dot, in dots from the left and from the top."""
    found = set()
    for row_, line in enumerate(lines[1:-2]):
        for column, character in enumerate(line[10:]):
            bits = ord(character) - 0x2800
            if 0 < bits < 256:
                for bit, (down, across) in enumerate(
                    [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (3, 0), (3, 1)]
                ):
                    if bits >> bit & 1:
                        found.add((2 * column + across, 4 * row_ + down))
    return found


def check_line(draw):
    """A straight line from corner to corner: every column once, on the line to half a dot."""
    found = dots(draw(([0.0, 10.0], [3.0, 1.0])))
    wide, high = max(x for x, _ in found), max(y for _, y in found)
    assert {x for x, _ in found} == set(range(wide + 1))
    assert (0, 0) in found
    assert (wide, high) in found
    for x, y in found:
        assert abs(y - x * high / wide) <= 1


def test_a_straight_line_is_straight():
    check_line(drawn)


@pytest.mark.parametrize("bits", [((1, 8), (2, 16), (4, 32), (128, 64)), ((8, 1),) * 4])
def test_dots_in_another_order_are_noticed(monkeypatch, bits):
    monkeypatch.setattr(terminal_plots, "_DOTS", bits)
    with pytest.raises(AssertionError):
        check_line(drawn)


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("count", [1, 2, 8, 30])
def test_it_is_as_large_as_was_asked(width, count):
    curves = [([1.0, 2.0, 3.0], [3.0 + i, 2.0, 1.0 + i / 10]) for i in range(count)]
    lines = drawn(*curves, width=width)
    assert len(lines) == HEIGHT
    assert max(map(len, lines)) <= width


def test_axes_say_the_range():
    lines = drawn(([0.0, 15000.0], [4.25, 1.5]))
    assert lines[1].split("┤")[0].strip() == "4.25"
    assert lines[-3].split("┤")[0].strip() == "1.5"
    assert lines[-1].split() == ["0", "steps", "15k"]


def test_each_line_is_named_at_its_end():
    lines = drawn(([0.0, 1.0], [4.0, 4.0]), ([0.0, 1.0], [4.0, 1.0]), ([0.0, 1.0], [3.0, 1.0]))
    assert lines[1].endswith("run0")
    assert lines[-4].endswith(("run1", "run2"))
    assert lines[-3].endswith(("run1", "run2"))


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (3.14159, "3.142"), (9999, "9999"), (10000, "10k"), (1.2345e6, "1.23M"),
     (248e9, "248G"), (3.5e12, "3.5T"), (-2e6, "-2M"), (1e30, "1e+09Z")],
)  # fmt: skip
def test_numbers_are_short(value, shown):
    assert terminal_plots._short(value) == shown


def test_one_value_and_no_value():
    assert len(dots(drawn(([5.0], [2.0])))) == 1
    assert drawn(([], [])) == ["loss: nothing to draw yet"]


def test_the_first_fall_does_not_press_the_rest_flat():
    y = [1000.0, *(2.0 - i / 100 for i in range(99))]
    lines = drawn(([float(i) for i in range(100)], y))
    assert lines[1].split("┤")[0].strip() == "1.96"
    assert math.isclose(float(lines[-3].split("┤")[0]), 1.02)


def test_losses_of_runs_are_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    pairs = {"loss": 0.7, "pairs": 8, "elapsed_s": 2.0, "pairs_per_s": 4.0}
    paths = [make_run(tmp_path / "a"), make_run(tmp_path / "b", config="lr: 2\n")]
    paths.append(make_run(tmp_path / "c", [{"step": 1, **pairs}], config="loss: dpo\n"))
    terminal_plots.print_losses(read_runs(paths), "tokens")
    text = capsys.readouterr().out
    assert text.count("training loss, smoothed (nats per token)") == 1
    assert text.count("validation loss (nats per token)") == 1
    assert text.count("training loss, smoothed (mean over pairs)") == 1
    assert max(map(len, text.splitlines())) <= 80


def test_a_small_plot_of_one_run(tmp_path):
    run = make_run(tmp_path / "mine", [row(i) for i in range(1, 30)])
    console = Console(record=True, width=60, file=io.StringIO())
    terminal_plots.print_loss(run, console)
    lines = console.export_text().splitlines()
    assert len(lines) == 10
    assert "training loss" in lines[0]
