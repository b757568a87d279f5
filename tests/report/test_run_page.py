"""The page of one run: figures, samples, and nothing loaded from elsewhere."""

import json
import re

import pytest
from report_pages import HOSTILE, Page, make_run, row

from openpalm.errors import DataError, SettingsError
from openpalm.report.page import environment_section, write_page
from openpalm.report.run_page import run_sections


def drawn(*runs):
    out = runs[0] / "report.html"
    sections = [section for run in runs for section in run_sections(run)]
    write_page(out, "A title", [*sections, environment_section()])
    return out.read_text(encoding="utf-8")


def test_the_page_holds_the_figures(tmp_path):
    page = Page(drawn(make_run(tmp_path / "mine")))
    facts = {
        "steps": "20",
        "tokens": "20,000",
        "minutes": "10.0",
        "tokens per second, median": "111",
        "training loss, last tenth": f"{(6 / 19 + 6 / 20) / 2:.3f}",
        "validation loss, nats per token": "0.388",
        "validation bits per byte": "0.16",
        "optim.lr": "0.0625",
        "model": "palm-tiny",
    }
    for name, value in facts.items():
        assert f"{name}{value}" in page.text, name
    for heading in ("A title", "mine: learning", "mine: settings", "Environment", "torch"):
        assert heading in page.text
    assert page.tags.count("svg") == 1
    assert "steps skipped" not in page.text


def points(page, colour):
    """The corners of the one line of that colour, in the picture's coordinates."""
    (path,) = re.findall(
        rf'<path d="([^"]*)"[^>]*stroke: {colour}[^>]*clip-path', page
    ) or re.findall(rf'<path d="([^"]*)" clip-path[^>]*stroke: {colour}', page)
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path)]


def test_the_curve_goes_through_every_loss(tmp_path):
    losses = [5.0, 3.0, 4.0, 1.5, 2.0, 0.5]
    rows = [row(i + 1, loss=loss) for i, loss in enumerate(losses)]
    found = points(drawn(make_run(tmp_path / "mine", rows)), "#9ecbff")
    assert len(found) == len(losses)
    (x0, y0), (x1, y1) = found[:2]
    for i, (x, y) in enumerate(found):
        assert x == pytest.approx(x0 + i * (x1 - x0), abs=0.01)
        assert y == pytest.approx(y0 + (losses[i] - 5) / (3 - 5) * (y1 - y0), abs=0.01)
    assert y1 > y0, "a lower loss is lower on the page, where y grows downwards"


def test_nothing_is_loaded_from_anywhere(tmp_path):
    samples = [{"step": 1, "samples": [{"prompt": HOSTILE, "text": HOSTILE}]}]
    config = f"model: {json.dumps(HOSTILE)}\n"
    page = Page(drawn(make_run(tmp_path / "mine", samples=samples, config=config)))
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert value.startswith("#"), (name, value)
        for address in re.findall(r"url\(([^)]*)\)", value or ""):
            assert address.startswith("#")
    assert not {"script", "img", "link", "iframe", "object", "embed", "form", "base"} & {*page.tags}
    style = page.text[: page.text.index("A title") + 2000]
    assert "@import" not in style


def test_whatever_was_sampled_is_shown_as_text(tmp_path):
    samples = [{"step": 4, "samples": [{"prompt": "Say: ", "text": HOSTILE}]}]
    run = make_run(tmp_path / "<b>mine", samples=samples)
    text = drawn(run)
    assert "<script" not in text
    assert "<b>" not in text
    page = Page(text)
    assert f"Say: {HOSTILE}" in page.text
    assert "<b>mine: learning" in page.text


def test_samples_of_the_beginning_the_middle_and_the_end(tmp_path):
    samples = [{"step": i, "samples": [{"prompt": "p", "text": f"text-{i}."}]} for i in range(1, 8)]
    text = Page(drawn(make_run(tmp_path / "mine", samples=samples))).text
    assert re.findall(r"text-(\d)", text) == ["1", "4", "7"]


def test_a_run_without_evaluations_and_samples(tmp_path):
    page = Page(drawn(make_run(tmp_path / "mine", [row(1, mfu=None)])))
    assert "validation" not in page.text
    assert "share of" not in page.text


def test_skipped_steps_and_lost_losses(tmp_path):
    rows = [row(1), row(2, loss=None, skipped="loss not finite"), row(3, skipped="x", loss=None)]
    text = Page(drawn(make_run(tmp_path / "mine", rows))).text
    assert "steps skipped2" in text
    assert "training loss, last tenthnan" in text, "no loss is not a loss of zero"


def test_a_torn_last_row_is_passed_over(tmp_path):
    run = make_run(tmp_path / "mine")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 21, "loss": 0.0')
    assert "steps20" in Page(drawn(run)).text


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "holds no metrics.jsonl; give a run directory"),
        ("", "has no training row yet"),
        ('{"step": 1, "val_loss": 2.0}\n', "has no training row yet"),
        ("\x00\x01garbage\n", "has no training row yet"),
    ],
)
def test_what_is_no_run_is_named(tmp_path, content, part):
    run = tmp_path / "mine"
    run.mkdir()
    if content is not None:
        (run / "metrics.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(str(run))) as error:
        run_sections(run)
    assert part in str(error.value)


def test_rows_of_something_else_are_named(tmp_path):
    run = make_run(tmp_path / "mine", [{"step": 1, "loss": 2.0}])
    with pytest.raises(DataError, match=re.escape(str(run))):
        run_sections(run)


def test_settings_that_are_missing_are_named(tmp_path):
    run = make_run(tmp_path / "mine")
    (run / "config.yaml").unlink()
    with pytest.raises(SettingsError) as error:
        run_sections(run)
    assert str(error.value) == f"{run / 'config.yaml'}: no such file; check the path"


def test_a_run_on_its_own_answers_shows_rewards(tmp_path):
    rows = [row(i, reward=0.1 * i) for i in range(1, 21)]
    judged = {"step": 20, "val_reward": 1.5, "val_kl": 0.5}
    make_run(tmp_path / "rl", rows=[*rows, judged, judged | {"step": 30, "val_gold": 0.25}])
    body = run_sections(tmp_path / "rl")[0].body
    assert "Reward and distance to the reference" in body
    make_run(tmp_path / "plain")
    assert "Reward and distance" not in run_sections(tmp_path / "plain")[0].body
