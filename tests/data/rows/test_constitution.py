"""Principles and rules from files."""

import pytest

from openpalm.data.rows.constitution import Article, Constitution, read_constitution
from openpalm.errors import DataError


def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_texts_and_weights(tmp_path):
    text = "principles:\n  - The kinder.\n  - text: ' The shorter. '\n    weight: 3\n"
    found = read_constitution(write(tmp_path, text), "principles")
    assert found.articles == (Article("The kinder.", 1.0), Article("The shorter.", 3.0))
    assert found.weights == [0.25, 0.75]


def test_the_version_depends_on_texts_and_weights_only(tmp_path):
    text = "principles: [The kinder.]"
    found = read_constitution(write(tmp_path, text), "principles")
    same = "# ours\nprinciples:\n- text: The kinder.\n  weight: 1.0\n"
    assert read_constitution(write(tmp_path, same), "principles").version == found.version
    others = ["The kinder", "{text: The kinder., weight: 2}", "The kinder., The shorter."]
    versions = {
        read_constitution(write(tmp_path, f"principles: [{other}]"), "principles").version
        for other in others
    }
    assert len(versions | {found.version}) == 4
    assert Constitution(found.articles).version == found.version


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rules: [a]", 'must hold "principles:"'),
        ("principles: [a]\nrules: [b]", "and nothing else"),
        ("principles: []", "with a list of texts"),
        ("principles: a", "with a list of texts"),
        ("principles: ['']", r"principles\[0\]: must be a text"),
        ("principles: [a, 3]", r"principles\[1\]: must be a text"),
        ("principles: [{text: a, wieght: 2}]", "field 'wieght' is unknown"),
        ("principles: [{text: a, weight: 0}]", "must be a number above 0"),
        ("principles: [{text: a, weight: .nan}]", "must be a number above 0"),
        ("principles: [{text: a, weight: true}]", "must be a number above 0"),
        ("principles: [" + "a, " * 257 + "]", "at most 256"),
        ("principles: [&a a, *a]", "YAML alias"),
        ("principles: [", "is not valid YAML"),
        ("- a", "must hold"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, says):
    with pytest.raises(DataError, match=says) as error:
        read_constitution(write(tmp_path, text), "principles")
    assert "c.yaml" in str(error.value)
