"""An HTML page is written as a whole, and its tables escape text."""

import os

import pytest
from report_pages import HOSTILE, Page

from openpalm.errors import SettingsError
from openpalm.report.page import SafeHtml, Section, table, tabs, write_page


def test_the_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    out = tmp_path / "new" / "page.html"
    write_page(out, "old", [])
    before = out.read_text(encoding="utf-8")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_page(out, "new", [Section("heading", "body")])
    assert out.read_text(encoding="utf-8") == before
    monkeypatch.undo()
    write_page(out, "new", [Section("heading", "body")])
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]


def test_a_page_cannot_take_the_place_of_a_directory(tmp_path):
    with pytest.raises(SettingsError, match="is a directory"):
        write_page(tmp_path, "title", [])


def test_a_table_aligns_numbers_and_escapes_the_rest():
    text = table(["name", "value"], [("<x>", 1234567), ("y", 0.00012345), ("z", True)])
    assert "<td>&lt;x&gt;</td>" in text
    assert '<td class="number">1,234,567</td>' in text
    assert '<td class="number">0.0001234</td>' in text or '"number">0.0001235</td>' in text
    assert "<td>True</td>" in text


def test_ready_html_is_kept_and_nothing_is_empty():
    text = table([SafeHtml("<i>a</i>")], [(SafeHtml("<b>x</b>"),), (None,), ("<b>y</b>",)])
    assert "<th><i>a</i></th>" in text
    assert "<td><b>x</b></td></tr><tr><td></td>" in text
    assert "<b>y" not in text


def test_tabs_show_the_first_pane_and_need_no_script():
    page = Page(tabs("s", HOSTILE, [(HOSTILE, "<p>one</p>"), ("second", "<p>two</p>")]))
    assert page.tags == ["div", "input", "label", "input", "label", "div", "p", "div", "p"]
    assert [name for name, _ in page.attributes].count("checked") == 1
    assert page.text == f"{HOSTILE} {HOSTILE} secondonetwo"
