"""Structure of the code: imports of torch, lengths of functions and files, nothing executed."""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

import openpalm
from openpalm.cli.main import DATA_VERBS, VERBS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "openpalm"
SOURCES = sorted(PACKAGE.rglob("*.py"))

MAX_FUNCTION_LINES = 80
MAX_FILE_LINES = 500
ONE_FILE = "convert/huggingface/modeling_openpalm.py"
"""may be longer: transformers loads it from a user's folder, where it is alone"""
MIGRATIONS = "feedback/migrations/"
"""may be longer: Django writes them"""
DJANGO_MODELS = "feedback/models/__init__.py"
"""imports the files of its folder: Django looks for an application's models there"""

# The rooms marked * on the architecture page, and what every command line passes through.
TORCH_FREE = sorted(
    path
    for pattern in ("*.py", "base/*.py", "data/**/*.py", "*/config.py", "cli/main.py")
    for path in PACKAGE.glob(pattern)
    if path.name not in ("__init__.py", "__main__.py")
    and path != PACKAGE / "data" / "batches" / "loader.py"
)

# Ways to execute what a file says: none is used.
EXECUTING_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
EXECUTING_CALLS = {
    "eval",
    "exec",
    "os.system",
    "pickle.load",
    "pickle.loads",
    "yaml.load",
    "yaml.full_load",
    "yaml.unsafe_load",
}


def _relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def _in_fresh_python(program: str, *argv: str) -> list:
    """The JSON that `program` prints on its last line, run where nothing is imported yet."""
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


IMPORTS = """
import importlib, json, sys
guilty = []
for name in sys.argv[1:]:
    importlib.import_module(name)
    if "torch" in sys.modules:
        guilty.append(name)
        break
print(json.dumps(guilty))
"""

HELPS = """
import contextlib, io, json, sys
from openpalm.cli.main import main
wrong = []
for words in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = main([*words.split(), "--help"])
    if status or "usage: openpalm" not in said.getvalue():
        wrong.append([words, status, said.getvalue()[:200]])
    if "torch" in sys.modules:
        wrong.append([words, "imports torch"])
        break
print(json.dumps(wrong))
"""


def test_importing_openpalm_imports_no_torch():
    assert _in_fresh_python(IMPORTS, "openpalm") == []


def test_rooms_before_the_model_import_no_torch():
    modules = ["openpalm." + _relative(p).removesuffix(".py").replace("/", ".") for p in TORCH_FREE]
    assert _in_fresh_python(IMPORTS, *modules) == []


def test_every_help_is_answered_without_torch():
    present = [
        verb for verb, (module, _) in VERBS.items() if (PACKAGE / f"cli/{module}.py").exists()
    ]
    if "data" in present:
        present += [f"data {verb}" for verb in DATA_VERBS]
    assert _in_fresh_python(HELPS, "", *present) == []


DJANGO = """
import os
import django
os.environ["DJANGO_SETTINGS_MODULE"] = "openpalm.feedback.settings"
django.setup()
"""


def test_the_feedback_application_imports_no_torch(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENPALM_FEEDBACK_DIR", str(tmp_path))
    monkeypatch.delenv("DATABASE_URL", raising=False)
    paths = [_relative(path) for path in SOURCES if _relative(path).startswith("feedback/")]
    modules = ["openpalm." + path.removesuffix(".py").replace("/", ".") for path in paths]
    assert "openpalm.feedback.wsgi" in modules
    assert _in_fresh_python(DJANGO + IMPORTS, *modules) == []


def test_every_package_is_allowed_or_forbidden_to_feedback():
    """import-linter has no list of what may be imported: its list of the rest must be complete."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "importlinter"
    ]["contracts"]
    layers = next(one["layers"] for one in contracts if one["containers"] == ["openpalm"])
    forbidden = next(one for one in contracts if one["type"] == "forbidden")["forbidden_modules"]
    at = next(number for number, layer in enumerate(layers) if "feedback" in layer)
    by_layers = {name.strip() for layer in layers[: at + 1] for name in layer.split("|")}
    here = {path.parent for path in SOURCES if path.name == "__init__.py"}
    rooms = {_relative(path).replace("/", ".") for path in here if path.parent == PACKAGE}
    rooms |= {f"data.{path.name}" for path in here if path.parent == PACKAGE / "data"}
    allowed = {"base", "data", "data.rows", "data.text"}
    assert rooms - by_layers - allowed == {name.removeprefix("openpalm.") for name in forbidden}


def test_package_inits_hold_a_docstring_at_most():
    inits = [path for path in SOURCES if path.name == "__init__.py" and path.parent != PACKAGE]
    found = {_relative(path): ast.parse(path.read_text(encoding="utf-8")) for path in inits}
    models = found.pop(DJANGO_MODELS)
    code = {
        name for name, tree in found.items() if tree.body[ast.get_docstring(tree) is not None :]
    }
    assert code == set()
    *imported, names = models.body[1:]
    assert {type(node) for node in imported} == {ast.ImportFrom}
    assert ast.unparse(names).startswith("__all__ = ")


def test_public_api_is_pinned():
    assert openpalm.__all__ == [
        "ModelConfig",
        "OpenPalmError",
        "Preference",
        "Transformer",
        "__version__",
        "convert",
        "generate",
        "load",
        "score",
        "train",
    ]
    assert all(hasattr(openpalm, name) for name in openpalm.__all__)
    assert dir(openpalm) == sorted(openpalm.__all__)


def test_functions_and_files_stay_short():
    long = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        lines = len(text.splitlines())
        free = _relative(path) == ONE_FILE or _relative(path).startswith(MIGRATIONS)
        if lines > MAX_FILE_LINES and not free:
            long.append(f"{_relative(path)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long.append(f"{_relative(path)}:{node.lineno} {node.name}: {lines} lines")
    assert long == []


def test_no_except_star():
    """Python before 3.11.4 wraps what is raised in it into a group, which nothing expects."""
    stars = [
        f"{path}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.TryStar)
    ]
    assert stars == []


def test_nothing_executes_what_a_file_says():
    found = {
        (_relative(path), name)
        for path in SOURCES
        for name in executing(path.read_text(encoding="utf-8"))
    }
    assert found == set()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("eval(text)", "eval"),
        ("import torch\ntorch.load(path)", "torch.load"),
        ("torch.load(path, weights_only=False)", "torch.load"),
        ("read(weights_only=False)", "weights_only"),
        ("np.load(path, allow_pickle=True)", "allow_pickle"),
        ("run(words, shell=True)", "shell"),
        ("yaml.load(text)", "yaml.load"),
    ],
)
def test_execution_is_recognised(source, name):
    assert name in set(executing(source))


def test_harmless_calls_are_not_mistaken():
    harmless = "model.eval()\ntorch.load(path, weights_only=True)\nyaml.safe_load(text)"
    assert set(executing(harmless)) == set()


def executing(source: str) -> Iterator[str]:
    """The names of constructs in `source` that could execute the content of a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from EXECUTING_MODULES & {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            yield from EXECUTING_MODULES & {(node.module or "").split(".")[0]}
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg}
            if called in EXECUTING_CALLS:
                yield called
            if called == "torch.load" and given.get("weights_only") != "True":
                yield called
            if given.get("weights_only", "True") != "True":
                yield "weights_only"
            yield from {"allow_pickle", "shell"} & {n for n, v in given.items() if v != "False"}


def test_text_is_read_and_written_as_utf8():
    found = [
        f"{_relative(path)}:{line}"
        for path in SOURCES
        for line in of_the_locale(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        ("path.write_text(text)", True),
        ("path.read_text()", True),
        ("path.open()", True),
        ('path.open("a")', True),
        ('open(name, "w", newline="")', True),
        ('open(name, mode="r")', True),
        ('path.open("a", encoding="utf-8")', False),
        ('open(name, "rb")', False),
        ('path.open(mode="wb")', False),
        ("os.open(path, os.O_RDONLY)", False),
        ("weights_file.opened(path)", False),
    ],
)
def test_text_of_the_locale_is_recognised(call, wrong):
    assert bool(list(of_the_locale(call))) == wrong


OPENS_BYTES = ("os.open", "archive.open")
"""calls named open without an encoding: a descriptor, a member of a zip file"""


def of_the_locale(source: str) -> Iterator[int]:
    """The lines that open a text in the encoding of the user's locale."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) in OPENS_BYTES:
            continue
        name = ast.unparse(node.func).rpartition(".")
        words = {word.arg: ast.unparse(word.value) for word in node.keywords}
        mode = node.args[0 if name[1] else 1 :][:1]
        binary = "b" in words.get("mode", ast.unparse(mode[0]) if mode else "")
        opens = name[2] in ("read_text", "write_text") or (name[2] == "open" and not binary)
        if opens and "encoding" not in words:
            yield node.lineno


def test_what_is_imported_is_declared():
    """But for starlette and pydantic, fastapi's own interface, and jinja2, which torch needs.

    markdown-it-py's module has a shorter name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    declared = {re.match(r"[\w.-]+", one)[0].replace("-", "_").lower() for one in wanted}
    declared |= {"yaml"} if "pyyaml" in declared else set()
    declared |= {"markdown_it"} if "markdown_it_py" in declared else set()
    declared |= {"jinja2"} if "torch" in declared else set()
    declared |= {"starlette", "pydantic"} if "fastapi" in declared else set()
    imported = {
        name.split(".")[0]
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in imports(node)
    }
    assert imported - sys.stdlib_module_names - {"openpalm"} - declared == set()


def test_torch_hub_asks_for_what_a_plain_install_has():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tree = ast.parse((ROOT / "hubconf.py").read_text(encoding="utf-8"))
    wanted = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "dependencies"
    )
    declared = {re.match(r"[\w-]+", one)[0].replace("-", "_") for one in project["dependencies"]}
    assert set(wanted) - {"yaml"} <= declared - {"PyYAML"}


def imports(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


def test_layers_are_kept():
    tool = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    if tool is None:
        pytest.skip("import-linter is not installed")
    done = subprocess.run(
        [tool, "--no-cache", "--no-logo"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout
