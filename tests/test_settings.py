"""One loader for all settings: who wins, what is understood, and what an error says."""

import dataclasses
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from openpalm.errors import SettingsError
from openpalm.settings import (
    MAX_CONFIG_BYTES,
    HelpRequested,
    build,
    parse,
    plain,
    read_yaml,
    spell,
    to_yaml,
)
from openpalm.train.config import ArchSettings, Chosen, OptimSettings, TrainSettings


@dataclass(frozen=True)
class Inner:
    """Inside."""

    lr: float = 0.5
    """a rate"""
    name: Literal["adamw", "muon"] = "adamw"
    """a choice"""
    nesterov: bool = True
    """a flag that is on"""


@dataclass(frozen=True)
class Settings:
    """Every kind of field."""

    data: Path
    """a folder"""
    words: list[str] = field(default_factory=list)
    """texts"""
    batch_tokens: int = 7
    """a whole number"""
    share: float = 0.25
    """a number"""
    title: str = "none"
    """a text"""
    maybe: int | None = None
    """may be left out"""
    text: str | None = None
    """a text that may be left out"""
    qk_norm: bool | None = None
    """a flag that may be left out"""
    stream: bool = False
    """a flag"""
    from_: str | None = None
    """a word that Python reserves"""
    inner: Inner = field(default_factory=Inner)
    """a group"""

    def __post_init__(self) -> None:
        if self.batch_tokens == 13:
            raise SettingsError("--batch-tokens 13: brings bad luck; use 14")


def read(*words, positional=(), kind=Settings, **more):
    return parse(
        kind,
        [str(word) for word in words],
        verb="try",
        about="Tries.",
        examples=["openpalm try this"],
        positional=positional,
        **more,
    )


def refused(*words, **how):
    with pytest.raises(SettingsError) as error:
        read(*words, **how)
    line = str(error.value)
    assert "\n" not in line
    return line


@pytest.fixture
def yaml_file(tmp_path):
    def write(content):
        path = tmp_path / "some.yaml"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content, encoding="utf-8")
        return path

    return write


# --- who wins


def test_defaults():
    assert read("--data", "d") == Settings(Path("d"))


def test_the_file_wins_over_defaults_and_the_command_line_over_the_file(yaml_file):
    file = yaml_file("data: there\nbatch_tokens: 100\ninner:\n  lr: 0.1\n  name: muon\n")
    from_file = Settings(Path("there"), batch_tokens=100, inner=Inner(0.1, "muon"))
    assert read("--config", file) == from_file
    changed = dataclasses.replace(from_file, batch_tokens=5, inner=Inner(0.2, "muon"))
    assert read("--config", file, "--batch-tokens", 5, "--inner.lr", 0.2) == changed
    assert read("--batch-tokens", 5, "--inner.lr=0.2", "--config", file) == changed


def test_the_later_of_two_options_wins():
    assert read("--data", "d", "--batch-tokens", 1, "--batch-tokens", 2).batch_tokens == 2


def test_a_file_may_spell_groups_with_dots(yaml_file):
    file = yaml_file("data: d\ninner.lr: 0.125\n")
    assert read("--config", file).inner == Inner(0.125)


@pytest.mark.parametrize("option", ["--batch-tokens", "--batch_tokens"])
@pytest.mark.parametrize("equals", [True, False])
def test_dashes_and_underscores(option, equals):
    words = [f"{option}=9"] if equals else [option, "9"]
    assert read("--data", "d", *words).batch_tokens == 9


def test_a_reserved_word():
    assert read("--data", "d", "--from", "x").from_ == "x"
    assert spell("from_") == "--from"


def test_aliases():
    settings = read("--data", "d", "--bt", 3, aliases={"bt": "batch_tokens"})
    assert settings.batch_tokens == 3


@pytest.mark.parametrize(
    ("words", "stream", "qk_norm", "nesterov"),
    [
        ([], False, None, True),
        (["--stream", "--qk-norm"], True, True, True),
        (["--stream=true", "--qk-norm=false"], True, False, True),
        (["--stream", "true", "--inner.nesterov", "false"], True, None, False),
        (["--no-stream", "--no-qk-norm"], False, False, True),
        (["--no_stream", "--inner.nesterov=false"], False, None, False),
        (["--stream", "--no-stream"], False, None, True),
        (["--no-stream", "--stream"], True, None, True),
    ],
)
def test_flags(words, stream, qk_norm, nesterov):
    settings = read("--data", "d", *words)
    assert (settings.stream, settings.qk_norm) == (stream, qk_norm)
    assert settings.inner.nesterov == nesterov


def test_a_flag_does_not_swallow_the_word_behind_it():
    settings = read("--stream", "here", positional=["data"])
    assert (settings.stream, settings.data) == (True, Path("here"))


def test_negative_numbers_are_values():
    settings = read("--data", "d", "--batch-tokens", "-3", "--share=-0.5")
    assert (settings.batch_tokens, settings.share) == (-3, -0.5)


def test_lists():
    assert read("--data", "d", "--words", '["a", "b"]').words == ["a", "b"]
    assert read("a", "b", "c", "--data", "d", positional=["words"]).words == ["a", "b", "c"]
    assert read("--data", "d", "1", "--", "--x", positional=["words"]).words == ["1", "--x"]


def test_positional_words_may_stand_anywhere():
    expected = Settings(Path("d"), text="hello world", batch_tokens=3)
    for words in (
        ["d", "hello world", "--batch-tokens", 3],
        ["d", "--batch-tokens", 3, "hello world"],
        ["--batch-tokens", 3, "d", "hello world"],
        ["--batch-tokens", 3, "--", "d", "hello world"],
    ):
        assert read(*words, positional=["data", "text"]) == expected
    assert read("d", positional=["data", "text"]).text is None


@pytest.mark.parametrize("text", ["null", "~", "true", "1e5", "-x", "{a", "[a]", "a: b", "", "\n"])
def test_a_positional_text_is_taken_as_it_is(text):
    assert read("d", text, positional=["data", "text"]).text == text


# --- unset is not falsy


@pytest.mark.parametrize("name", ["batch_tokens", "maybe", "share"])
def test_zero_is_a_value(name, yaml_file):
    for settings in (
        read("--data", "d", spell(name), 0),
        read("--config", yaml_file(f"data: d\n{name}: 0\n")),
    ):
        assert getattr(settings, name) == 0
        assert getattr(settings, name) is not None
        assert build(Settings, yaml.safe_load(to_yaml(settings))) == settings


def test_false_and_empty_are_values(yaml_file):
    settings = Settings(Path("d"), title="", text="", qk_norm=False, inner=Inner(0.0))
    file = yaml_file(to_yaml(settings))
    assert read("--config", file) == settings
    assert build(Settings, read_yaml(file)) == settings
    assert read("--data", "d", "--title", "", "--text=", "--no-qk-norm", "--inner.lr=0") == settings


# --- there and back

EVERYTHING = Settings(
    Path("some/where"),
    words=["a", "null", "1"],
    batch_tokens=-1,
    share=1e-8,
    title="yes: no # \n 日本",
    maybe=0,
    text="",
    qk_norm=False,
    stream=True,
    from_="x",
    inner=Inner(3e-4, "muon", False),
)
TRAINING = TrainSettings(
    data=Path("data"),
    out=Path("run"),
    model="palm-tiny",
    minutes=0.5,
    seed=-3,
    arch=ArchSettings(kv_heads=2, qk_norm=False, dropout=0.0),
    optim=OptimSettings(name="muon", lr=1e-5, warmup=0.0),
    chosen=Chosen(dtype="float32", steps=7, peak_flops=1.5e11, data="00", parent=None),
)


@pytest.mark.parametrize("settings", [Settings(Path("d")), EVERYTHING, TRAINING])
def test_yaml_reads_back_to_the_same_settings(settings, yaml_file):
    file = yaml_file(to_yaml(settings))
    assert build(type(settings), read_yaml(file)) == settings
    assert read("--config", file, kind=type(settings)) == settings


def test_what_is_not_set_is_not_written():
    assert set(plain(Settings(Path("d")))) == {
        "data",
        "words",
        "batch_tokens",
        "share",
        "title",
        "stream",
        "inner",
    }
    assert "chosen" not in plain(dataclasses.replace(TRAINING, chosen=Chosen()))


def test_build_refuses_an_unknown_name():
    with pytest.raises(SettingsError, match="Inner has no field momentum"):
        build(Settings, {"data": "d", "inner": {"momentum": 1}})


# --- what an error says


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--batch-tokens", "many"], ["--batch-tokens many", "must be a whole number"]),
        (["--batch-tokens", "1.5"], ["--batch-tokens 1.5", "must be a whole number"]),
        (["--share", "half"], ["--share half", "must be a number"]),
        (["--maybe", "x"], ["--maybe x", "must be a whole number"]),
        (["--inner.lr", "fast"], ["--inner.lr fast", "must be a number"]),
        (["--inner.name", "sgd"], ["--inner.name sgd", "must be one of adamw, muon"]),
        (["--stream=perhaps"], ["--stream perhaps", "must be true or false"]),
        (["--qk-norm=perhaps"], ["--qk-norm perhaps", "must be true or false"]),
        (["--batch-tokens"], ["--batch-tokens", "needs a value"]),
    ],
)
def test_a_wrong_value_names_option_value_and_remedy(words, parts):
    line = refused("--data", "d", *words)
    assert all(part in line for part in parts), line
    assert line.endswith("see `openpalm try --help`")


def test_values_wrong_at_birth_speak_for_themselves():
    line = refused("--data", "d", "--batch-tokens", 13)
    assert line == "--batch-tokens 13: brings bad luck; use 14"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--batch-token", "--batch-tokens"),
        ("--batchtokens", "--batch-tokens"),
        ("--Share", "--share"),
        ("--inner.rl", "--inner.lr"),
        ("--inner-lr", "--inner.lr"),
        ("--confg", "--config"),
    ],
)
def test_an_unknown_option_suggests(given, meant):
    line = refused("--data", "d", f"{given}=1")
    assert line == f"unknown option {given}; did you mean {meant}?"


def test_an_unknown_option_like_no_other_points_to_the_help():
    assert refused("--zzz") == "unknown option --zzz; see `openpalm try --help`"


def test_options_are_not_abbreviated():
    assert refused("--data", "d", "--batch", 3).startswith("unknown option --batch")


def test_missing_options_and_words():
    assert refused() == "missing --data; see `openpalm try --help`"
    assert refused(positional=["data"]) == "missing DATA; see `openpalm try --help`"


def test_words_too_many():
    line = refused("--data", "d", "stray")
    assert line == "unexpected stray; see `openpalm try --help`"
    line = refused("d", "a text", "of", "words", positional=["data", "text"])
    assert line.startswith("unexpected of words; a text of several words needs quotes")


# --- files of settings


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("batch_token: 3\n", "unknown setting batch_token; did you mean batch_tokens?"),
        ("zzz: 3\n", "unknown setting zzz; see"),
        ("inner:\n  lrr: 3\n", "unknown setting inner.lrr; did you mean inner.lr?"),
        ("inner: 3\n", "unknown setting inner"),
        ("3: 4\n", "unknown setting 3"),
        ("share: null\n", "share has no value"),
        ("inner:\n  lr:\n", "inner.lr has no value"),
        ("data: [\n", "is not valid YAML"),
        ("a: b: c\n", "is not valid YAML"),
        ("\tdata: d\n", "is not valid YAML"),
        ("title: 2024-13-45\n", "is not valid YAML"),
        ("? [a]\n: b\n", "is not valid YAML"),
        ("title: %bad\n", "is not valid YAML"),
        ("title: " + "[" * 3000 + "]" * 3000, "is not valid YAML"),
        ("", "must hold `name: value` lines"),
        ("just words\n", "must hold `name: value` lines"),
        ("- a\n- b\n", "must hold `name: value` lines"),
        (b"title: \xff\xfe\n", "is not UTF-8"),
        (b"\x00\x01\x02", "is not valid YAML"),
        ("title: !!python/object/apply:os.system ['touch executed']\n", "is not valid YAML"),
        ("title: !!python/name:os.system\n", "is not valid YAML"),
        ("title: !unheard x\n", "is not valid YAML"),
        ("share: &a 0.5\nbatch_tokens: *a\n", "holds a YAML alias"),
        ("inner: &a\n  lr: *a\n", "holds a YAML alias"),
        ("title: x\n" + "#" * MAX_CONFIG_BYTES, f"more than {MAX_CONFIG_BYTES} bytes"),
    ],
)
def test_a_bad_file_is_named(yaml_file, tmp_path, monkeypatch, content, part):
    monkeypatch.chdir(tmp_path)
    file = yaml_file(content)
    line = refused("--data", "d", "--config", file)
    assert line.startswith(f"--config {file}: ")
    assert part in line
    assert sorted(os.listdir(tmp_path)) == ["some.yaml"]


def test_a_wrong_value_in_a_file(yaml_file):
    line = refused("--config", yaml_file("data: d\nbatch_tokens: many\n"))
    assert "--batch-tokens many: must be a whole number" in line


def test_a_missing_file_and_a_folder(tmp_path):
    missing = tmp_path / "missing.yaml"
    assert refused("--config", missing) == f"--config {missing}: no such file; check the path"
    assert refused("--config", tmp_path) == (
        f"--config {tmp_path}: cannot be read (Is a directory); check the path"
    )


def test_a_bomb_of_aliases_is_refused_at_once(yaml_file):
    """Nine levels of nine: 400 million words, should anything ever print or copy them."""
    levels = ["&a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"&a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(8)]
    started = time.monotonic()
    line = refused("--config", yaml_file(f"data: d\nwords: [{', '.join(levels)}]\n"))
    assert "holds a YAML alias" in line
    assert time.monotonic() - started < 2


def test_a_verb_with_a_config_of_its_own_reads_no_yaml(tmp_path):
    @dataclass(frozen=True)
    class Own:
        config: Path | None = None
        """a JSON file"""

    assert read("--config", "some.json", kind=Own) == Own(Path("some.json"))


# --- help


@pytest.mark.parametrize("words", [["-h"], ["--help"], ["--data", "d", "--help"], ["--help", "x"]])
def test_help_comes_before_any_complaint(words):
    with pytest.raises(HelpRequested) as asked:
        read(*words)
    text = str(asked.value)
    assert text.startswith("usage: openpalm try")
    for part in ("--batch-tokens INT", "a whole number (default: 7)", "--inner.lr NUMBER"):
        assert part in text
    for part in ("--from TEXT", "adamw|muon", "a folder (required)", "  openpalm try this"):
        assert part in text


def test_help_behind_two_dashes_is_a_word():
    assert read("d", "--", "--help", positional=["data", "text"]).text == "--help"


def test_every_field_is_in_the_help():
    with pytest.raises(HelpRequested) as asked:
        read("--help", kind=TrainSettings)
    text = str(asked.value)
    for kind, prefix in ((TrainSettings, ""), (OptimSettings, "optim."), (ArchSettings, "arch.")):
        for item in dataclasses.fields(kind):
            if not dataclasses.is_dataclass(item.type):
                assert f"{spell(prefix + item.name)} " in text
