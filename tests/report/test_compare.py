"""Comparison of runs on one page: distinct lines, order, and no mix of different losses."""

import re

import numpy as np
import pytest
from report_pages import HOSTILE, Page, evaluation, make_run, row

from openpalm.checkpoint import directory as checkpoint
from openpalm.model.config import ModelConfig
from openpalm.model.transformer import Transformer, initialise
from openpalm.report import plots
from openpalm.report.compare import comparison_sections
from openpalm.report.page import write_page
from openpalm.report.runs import read_runs


def made(folder, count, **how):
    configs = [f"model: m\noptim: {{lr: 0.{i}}}\nseed: 0\n" for i in range(1, count + 1)]
    return [make_run(folder / f"run{i}", config=c, **how) for i, c in enumerate(configs)]


def page_of(paths):
    out = paths[0] / "report.html"
    write_page(out, "title", comparison_sections(read_runs(paths)))
    return out.read_text(encoding="utf-8")


def test_two_runs_share_their_figures(tmp_path):
    page = Page(page_of(made(tmp_path, 2)))
    order = ["Runs", "Learning", "against steps tokens minutes", "Throughput", "Settings that"]
    order += ["Each run", "run0: learning", "run1: settings"]
    places = [page.text.index(part) for part in order]
    assert places == sorted(places)
    assert "optim.lr0.10.2" in page.text
    labels = [v for n, v in page.attributes if n == "aria-label"]
    assert labels[:4] == [f"Learning against {x}" for x in ("steps", "tokens", "minutes")] + [
        "Throughput against steps"
    ]
    assert "training FLOPs" not in page.text, "no run has a checkpoint that says its size"
    assert "Samples" not in page.text


def strokes(html, colour, label):
    """The number of lines of a colour in the first figure of that label."""
    figure = html[html.index(f'aria-label="{label}"') :]
    figure = figure[: figure.index("</figure>")]
    return len(re.findall(rf"stroke: {colour.lower()}[^>]*", figure))


def test_every_run_of_eight_has_a_look_of_its_own(tmp_path):
    html = page_of(made(tmp_path, 8))
    for colour in plots.COLOURS:
        assert strokes(html, colour, "Learning against tokens") >= 2, colour
    looks = [plots.Line(i, []) for i in range(1, 33)]
    assert len({(line.colour, line.dashes) for line in looks}) == 16
    assert len({(line.colour, line.dashes) for line in looks[:16]}) == 16


def test_colours_stay_apart_in_luminance_from_the_page():
    """WCAG 2.1, 1.4.11: a line needs 3:1 against white."""
    for colour in plots.COLOURS:
        rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        contrast = 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05)
        assert contrast >= 3, (colour, contrast)


def pairs(i):
    return {"step": i, "loss": 0.7, "pairs": 8 * i, "elapsed_s": 2.0 * i, "pairs_per_s": 4.0}


def test_runs_whose_losses_mean_another_thing_get_figures_of_their_own(tmp_path):
    dpo = make_run(tmp_path / "dpo", [pairs(1), pairs(2)], config="loss: dpo\n")
    page = Page(page_of([*made(tmp_path, 2), dpo]))
    assert "Learning: runs 1, 2" in page.text
    assert "Learning: run 3" in page.text
    assert "against steps pairs minutes" in page.text
    assert "16 pairs" in page.text
    assert [v for n, v in page.attributes if n == "aria-label"].count(
        "Throughput against steps"
    ) == 2


def test_a_run_that_goes_on_and_one_that_lost_steps(tmp_path):
    rows = [row(1), row(2, loss=None, skipped="loss not finite"), row(3)]
    going = make_run(tmp_path / "going", rows)
    (going / "run.json").write_text('{"steps": 50}', encoding="utf-8")
    whole = make_run(tmp_path / "whole", config="chosen: {steps: 20}\n")
    text = Page(page_of([going, whole])).text
    assert "3 of 50 (1 skipped)3,000 tokens" in text
    assert "2020,000 tokens" in text


def test_seeds_become_one_line_with_a_band(tmp_path):
    runs = []
    for seed, value in enumerate((1.0, 2.0, 6.0)):
        rows = [*(row(i, loss=value) for i in range(1, 5)), evaluation(4) | {"val_loss": value}]
        runs.append(make_run(tmp_path / f"s{seed}", rows, config=f"seed: {seed}\nlr: 1\n"))
    text = Page(page_of([*runs, *made(tmp_path, 1)])).text
    assert "1 s0, s1, s2 (mean and range of 3 seeds)" in text
    assert re.search(r"1332\.64616", text), "mean 3, standard deviation sqrt(7), from 1 to 6"


def check_band(band):
    a = (np.array([0.0, 1.0, 2.0]), np.array([0.0, 10.0, 20.0]))
    b = (np.array([1.0, 3.0]), np.array([20.0, 40.0]))
    x, low, mean, high = band([a, b])
    np.testing.assert_allclose(x, [1, 2])
    np.testing.assert_allclose([low, mean, high], [[10, 20], [15, 25], [20, 30]])


def test_a_band_is_where_all_curves_are():
    check_band(plots._band)


def test_a_band_that_goes_on_where_one_curve_ended_is_noticed():
    def careless(curves):
        x = np.unique(np.concatenate([x for x, _ in curves]))
        stack = np.stack([np.interp(x, *curve) for curve in curves])
        return x, stack.min(0), stack.mean(0), stack.max(0)

    with pytest.raises(AssertionError):
        check_band(careless)


def texts(*steps):
    return [{"step": i, "samples": [{"prompt": "p", "text": f"t{i}."}]} for i in steps]


def test_samples_stand_side_by_side_at_the_same_steps(tmp_path):
    a = make_run(tmp_path / "a", samples=texts(2, 4, 6, 8, 9))
    b = make_run(tmp_path / "b", samples=texts(4, 6, 8), config="seed: 0\nlr: 2\n")
    text = Page(page_of([a, b])).text
    shown = text[text.index("Samples") : text.index("Each run")]
    assert re.findall(r"after step (\d)", shown) == ["8", "6", "4"]
    assert re.findall(r"t(\d)\.", shown) == ["8", "8", "6", "6", "4", "4"]


def test_samples_of_different_steps_say_which(tmp_path):
    a = make_run(tmp_path / "a", samples=texts(2))
    b = make_run(tmp_path / "b", samples=texts(3), config="seed: 0\nlr: 2\n")
    text = Page(page_of([a, b])).text
    assert "1 a, step 2" in text
    assert "2 b, step 3" in text


def test_other_data_is_told_and_bits_a_byte_are_drawn(tmp_path):
    runs = [make_run(tmp_path / n, config=f"chosen: {{data: {n * 20}}}\n") for n in "ab"]
    text = Page(page_of(runs)).text
    assert "These runs have different data" in text
    assert f"run.data{'a' * 12}{'b' * 12}" in text
    assert "different data" not in Page(page_of(made(tmp_path, 2))).text


def test_hostile_names_and_settings_are_text(tmp_path):
    hostile = HOSTILE.replace("/", "_")
    config = f"model: '{HOSTILE}'\n"
    rows = [*texts(1), {"step": 2, "samples": [{"prompt": HOSTILE, "text": HOSTILE}]}]
    runs = [make_run(tmp_path / hostile, samples=rows, config=config)]
    runs += [make_run(tmp_path / "$\\frac{", samples=rows, config="model: '$x_'\n")]
    html = page_of(runs)
    page = Page(html)
    assert "<script" not in html
    assert not {"script", "img", "link", "iframe", "form"} & {*page.tags}
    assert hostile in page.text


def test_the_table_has_the_size_of_a_run_whose_checkpoint_says_it(tmp_path):
    config = ModelConfig(
        vocab_size=7000, dim=256, depth=2, heads=4, head_dim=64, ff_dim=512, context=16
    )
    paths = made(tmp_path, 2)
    model = Transformer(config)
    initialise(model, 0)
    checkpoint.save(paths[1] / "checkpoints" / checkpoint.step_name(20), model)
    table = page_of(paths)
    table = table[table.index("<table") : table.index("</table>")]
    cells = [
        [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    ]
    column = cells[0].index("parameters, millions")
    numbers = sum(p.numel() for p in model.parameters()) / 1e6
    assert cells[1][column] in ("", "-")
    assert float(cells[2][column]) == pytest.approx(numbers, rel=0.01)
