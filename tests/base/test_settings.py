"""One loader for all settings: who wins, what is understood, and what an error says."""

import dataclasses
import importlib
import os
import re
from dataclasses import dataclass, field, is_dataclass
from math import inf
from pathlib import Path
from typing import Literal

import pytest
import yaml

from openpalm import __version__
from openpalm.base.settings import HelpRequested, _options, build, parse, plain, settings_of, spell
from openpalm.base.typed import alternatives, convert
from openpalm.base.yaml_file import MAX_BYTES, packaged, read_yaml, to_yaml
from openpalm.cli.main import VERBS
from openpalm.errors import SettingsError
from openpalm.train.config import ArchSettings, PretrainSettings, TrainSettings
from openpalm.train.optimizer_settings import OptimSettings

LANDED = Path(__file__).resolve().parents[1] / "landed" / "data"
"""runs that OpenPaLM 0.1.0 made"""
A_GROUP = "a group of settings, such as inner: {lr: ...}"


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
    several: list[str] | str | None = None
    """a text or several"""
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


LOOKS_LIKE_YAML = [
    *("[END]", "[a, b]", "# ", "# x", "null", "~", "---", "- a", "&x", "*x", "!x", "{a}", "a: b"),
    *("true", "no", "1e5", "007", "0x10", "1:30", "2024-01-01", "'q'", '"q"', "|", ">", "%", "@"),
    *("", " ", " x ", "\n", "\\n", "=", "a#b", "日本", "[1, 2]", '["a", 1]', "~/x"),
]


@pytest.mark.parametrize("text", LOOKS_LIKE_YAML)
def test_an_option_that_is_a_text_is_the_text_as_typed(text):
    for words in (["--text", text], [f"--text={text}"]):
        assert read("--data", "d", *words).text == text
    assert read("--data", "d", "--title", text).title == text
    assert read("--data", "d", "--several", text).several == text
    assert read("--data", "d", "--words", text).words == [text]


@pytest.mark.parametrize("text", LOOKS_LIKE_YAML)
def test_a_text_comes_back_from_a_file_of_settings(text, yaml_file):
    settings = Settings(Path("d"), title=text, text=text, words=[text, "b"], several=text)
    file = yaml_file(to_yaml(settings))
    assert read("--config", file) == settings
    assert build(Settings, read_yaml(file)) == settings


@pytest.mark.parametrize("text", ["007", "1e3", "no", "0x10", "1:30", "2024-13-45", "1_0", "="])
def test_a_text_needs_no_quotes_in_a_file(text, yaml_file):
    settings = read("--config", yaml_file(f"data: {text}\ntitle: {text}\nwords: [{text}]\n"))
    assert settings == Settings(Path(text), title=text, words=[text])


def test_every_option_of_every_verb_that_is_a_text_is_taken_as_typed():
    """Whatever its place; a value may be refused by its settings, but never altered."""
    texts = 0
    for kind in settings_of_verbs():
        for name, hint in _options(kind).items():
            kinds = alternatives(hint)
            if str not in kinds:
                continue
            texts += 1
            for text in ("[END]", "# x", "null", "~", "---", "1e3"):
                assert convert(text, hint) == text, (kind, name)
    assert texts > 50


def settings_of_verbs():
    for module, _ in VERBS.values():
        found = vars(importlib.import_module(f"openpalm.cli.{module}")).values()
        yield from (kind for kind in found if isinstance(kind, type) and is_dataclass(kind))


@pytest.mark.parametrize(
    ("words", "several"),
    [
        (["--several", '["a", "b"]'], ["a", "b"]),
        (["--several", '["[END]"]'], ["[END]"]),
        (["--several", "[]"], []),
        (["--several", "a, b"], "a, b"),
        (["--several", "a", "--several", '["b", "c"]', "--several=d"], ["a", "b", "c", "d"]),
    ],
)
def test_several_texts_are_a_json_list(words, several):
    assert read("--data", "d", *words).several == several


def test_a_number_that_may_be_left_out_is_unset_by_null(yaml_file):
    file = yaml_file("data: d\nmaybe: 3\nqk_norm: true\n")
    assert read("--config", file, "--maybe", "null", "--qk-norm=null") == Settings(Path("d"))


# --- the home directory


def test_a_tilde_in_a_file_is_the_home_directory(yaml_file, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = read("--config", yaml_file("data: ~/runs/a\ntitle: ~/b\n"))
    assert (settings.data, settings.title) == (tmp_path / "runs" / "a", "~/b")
    assert read("--data=~/c").data == tmp_path / "c"  # no shell expands that
    assert read("--data", "~").data == tmp_path
    for other in ("a/~/b", "~b", "./~", "~tmp/x"):
        assert read("--data", other).data == Path(other)


# --- numbers


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e3", 1000), ("5", 5), ("-3", -3), ("1_000", 1000), ("2.0", 2), ("+7", 7), ("007", 7)],
)
def test_whole_numbers(text, number, yaml_file):
    for settings in (
        read("--data", "d", "--batch-tokens", text, "--maybe", text),
        read("--config", yaml_file(f"data: d\nbatch_tokens: {text}\nmaybe: {text}\n")),
    ):
        assert (settings.batch_tokens, settings.maybe) == (number, number)
        assert type(settings.batch_tokens) is int


@pytest.mark.parametrize(
    ("text", "number"), [("1e-3", 0.001), (".5", 0.5), ("3", 3.0), ("1E3", 1000.0), (".inf", inf)]
)
def test_numbers(text, number, yaml_file):
    assert read("--data", "d", "--share", text).share == number
    assert read("--config", yaml_file(f"data: d\nshare: {text}\n")).share == number


@pytest.mark.parametrize("option", ["--batch-tokens", "--maybe"])
@pytest.mark.parametrize(
    "text",
    ["1.5", "1e400", "nan", "inf", "1e300", "ten", "", "0x10", "1,000", "[1]", "true", "9" * 5000],
)
def test_what_is_no_whole_number_is_refused_in_plain_words(option, text):
    line = refused("--data", "d", option, text)
    shown = text if len(text) < 100 else f"{text[:100]}..."
    assert line == f"{option} {shown}: must be a whole number; see `openpalm try --help`"


@pytest.mark.parametrize(
    "content", ["data: [a]\n", "data: {a: b}\n", "data: ''\n", 'data: "\\0"\n']
)
def test_what_is_no_path_is_refused_in_plain_words(yaml_file, content):
    line = refused("--config", yaml_file(content))
    assert ": must be a path; see" in line
    assert "PathLike" not in line


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"data": "d", "batch_tokens": "many"}, "batch_tokens many: must be a whole number"),
        ({"data": "d", "batch_tokens": True}, "batch_tokens true: must be a whole number"),
        ({"data": "d", "inner": {"name": "cow"}}, "inner.name cow: must be one of adamw, muon"),
        ({"data": "d", "inner": {"lr": []}}, "inner.lr []: must be a number"),
        (
            {"data": "d", "inner": 3},
            f"inner 3: must be {A_GROUP}",
        ),
        ({"data": "d", "stream": 1}, "stream 1: must be true or false"),
        ({"data": "d", "words": [1]}, "words [1]: must be a list of texts"),
        ({"data": "d", "title": 7}, "title 7: must be a text"),
        ({"data": "d", "title": None}, "title null: must be left out or have a value"),
        ({}, "missing data"),
    ],
)
def test_build_checks_every_value(values, said):
    with pytest.raises(SettingsError) as caught:
        build(Settings, values)
    assert str(caught.value) == said


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


def test_the_path_of_the_settings_file_is_known_but_is_no_setting(yaml_file):
    file = yaml_file(to_yaml(TRAINING))
    found = read("--config", file, kind=TrainSettings)
    assert found.config_file == Path(file)
    assert "config_file" not in plain(found)
    assert "config_file" not in _options(TrainSettings)
    assert (
        read(
            *["--data", "d", "--out", "o", "--model", "m", "--steps", "1"], kind=TrainSettings
        ).config_file
        is None
    )
    with pytest.raises(SettingsError, match="unknown option --config-file"):
        read("--config-file", file, kind=TrainSettings)


def test_build_refuses_an_unknown_name():
    with pytest.raises(SettingsError, match=r"^unknown setting inner\.momentum$"):
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
        ("--lr", "--inner.lr"),
        ("--batch-size", "--batch-tokens"),
        ("--tokens", "--batch-tokens"),
        ("--norm", "--qk-norm"),
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
        ("inner: 3\n", "inner 3: must be a group of settings, such as inner: {lr: ...}"),
        ("3: 4\n", "unknown setting 3"),
        ("share: null\n", "share has no value"),
        ("inner:\n  lr:\n", "inner.lr has no value"),
        ("data: [\n", "is not valid YAML"),
        ("a: b: c\n", "is not valid YAML"),
        ("\tdata: d\n", "is not valid YAML"),
        ("batch_tokens: 1\nbatch_tokens: 2\n", "batch_tokens is in lines 1 and 2"),
        ("inner:\n  lr: 1\n  name: muon\n  lr: 2\n", "lr is in lines 2 and 4"),
        ("inner:\n  lr: 1\ninner.lr: 2\n", "inner.lr is set twice"),
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
        ("title: x\n" + "#" * MAX_BYTES, f"more than {MAX_BYTES} bytes"),
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
    assert "some.yaml: batch_tokens many: must be a whole number; see" in line


def test_a_file_of_another_version_names_both_versions(tmp_path):
    run = LANDED / "train" / "run"
    argv = ["--config", str(run / "config.yaml"), "--out", str(tmp_path / "out")]
    assert re.sub(r"keep_\w+", "keep_...", refused(*argv, kind=PretrainSettings)) == (
        f"--config {run / 'config.yaml'}: was written by OpenPaLM '0.1.0', and this is "
        f"{__version__} (unknown setting keep; did you mean keep_...?); change a copy of "
        f"the file, or start from that run's weights with --init {run}"
    )


def test_a_file_beside_a_run_of_this_version_has_no_other_version(tmp_path, yaml_file):
    run_json = tmp_path / "run.json"
    for text in (f'{{"openpalm": "{__version__}"}}', '{"openpalm": 3}', "{torn", "[]"):
        run_json.write_text(text, encoding="utf-8")
        line = refused("--config", yaml_file("zzz: 3\n"))
        assert (
            line == f"--config {tmp_path}/some.yaml: unknown setting zzz; see `openpalm try --help`"
        )
    run_json.write_text('{"openpalm": "9.0"}', encoding="utf-8")
    line = refused("--config", yaml_file("batch_tokens: many\n"))
    assert "was written by OpenPaLM '9.0', and this is" in line
    assert line.endswith("see `openpalm try --help`); change a copy of the file")


def test_a_check_of_a_value_from_a_file_names_the_file(yaml_file):
    file = yaml_file("data: d\nbatch_tokens: 13\n")
    said = "batch_tokens 13: brings bad luck; use 14"
    assert refused("--config", file) == f"--config {file}: {said}"
    assert refused("--config", file, "--batch-tokens", 13) == f"--batch-tokens 13: {said[17:]}"


def test_build_suggests_a_name():
    with pytest.raises(SettingsError, match=r"inner\.nam \(did you mean inner\.name\?\)$"):
        build(Settings, {"data": "d", "inner": {"nam": "muon"}})


def test_a_missing_file_and_a_folder(tmp_path):
    missing = tmp_path / "missing.yaml"
    assert refused("--config", missing) == f"--config {missing}: no such file; check the path"
    assert refused("--config", tmp_path) == (
        f"--config {tmp_path}: cannot be read (Is a directory); check the path"
    )


def test_a_bomb_of_aliases_is_refused(yaml_file):
    """Nine levels of nine: 400 million words, should anything ever print or copy them."""
    levels = ["&a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"&a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(8)]
    line = refused("--config", yaml_file(f"data: d\nwords: [{', '.join(levels)}]\n"))
    assert "holds a YAML alias" in line


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


@pytest.mark.parametrize("columns", [50, 80, 100, 160])
def test_help_is_as_wide_as_the_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(HelpRequested) as asked:
        parse(TrainSettings, ["--help"], verb="train", about="word " * 60, examples=[])
    lines = [line for line in str(asked.value).splitlines() if "--" not in line]
    assert columns - 12 <= max(map(len, lines)) <= columns - 2


def test_help_behind_two_dashes_is_a_word():
    assert read("d", "--", "--help", positional=["data", "text"]).text == "--help"


def test_every_field_is_in_the_help():
    with pytest.raises(HelpRequested) as asked:
        read("--help", kind=TrainSettings)
    text = str(asked.value)
    for kind, prefix in ((TrainSettings, ""), (OptimSettings, "optim."), (ArchSettings, "arch.")):
        for item in settings_of(kind):
            if not dataclasses.is_dataclass(item.type):
                assert f"{spell(prefix + item.name)} " in text


def test_a_recipe_of_the_package_is_found_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """configs/NAME.yaml is the file here; without one it is the package's own."""
    monkeypatch.chdir(tmp_path)
    own = packaged(Path("configs/laptop.yaml"))
    assert own.read_text(encoding="utf-8").startswith("# Half an hour on a laptop")
    assert packaged(Path("laptop.yaml")) == Path("laptop.yaml")
    assert packaged(Path("configs/none.yaml")) == Path("configs/none.yaml")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "laptop.yaml").write_text("minutes: 1", encoding="utf-8")
    assert packaged(Path("configs/laptop.yaml")) == Path("configs/laptop.yaml")
