"""Prints size figures of the code: lines of logic, function and file lengths, comments, folders.

    python tests/code_size.py [src/openpalm]

A line of logic is a line of code that is not blank and not a comment, docstring or import.
Migrations are left out: Django writes them.
"""

import ast
import io
import statistics
import sys
import tokenize
from collections import Counter
from pathlib import Path

HARD_BODIES = (
    "align/pairs/shared_prompt.py",
    "align/rollouts/rollout.py",
    "align/rollouts/rollout_batch.py",
    "data/batches/loader.py",
    "data/batches/order.py",
    "data/prepare/segments.py",
    "data/prepare/split.py",
    "generate/engine.py",
    "generate/quantize.py",
    "model/layout.py",
    "serve/worker.py",
    "train/run.py",
)
"""Files of src/openpalm in which a reader needs comments that give reasons."""

_NO_CODE = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.COMMENT,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
}


def docstring_lines(tree: ast.AST) -> set[int]:
    """Line numbers of docstrings, of modules, classes, functions and attributes alike."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def import_lines(tree: ast.AST) -> set[int]:
    """Line numbers of import statements."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def logic_and_comments(text: str) -> tuple[int, int]:
    """How many lines of logic `text` has, and how many comments."""
    tree = ast.parse(text)
    code: set[int] = set()
    comments = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments += 1
        elif token.type not in _NO_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - docstring_lines(tree) - import_lines(tree)), comments


def function_lengths(text: str) -> list[int]:
    """Lines of every function in `text`, its signature and docstring included."""
    return [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def report(root: Path) -> str:
    """The figures of every Python file under `root`, as text."""
    paths = [path for path in sorted(root.rglob("*.py")) if path.parent.name != "migrations"]
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    counts = {path: logic_and_comments(text) for path, text in texts.items()}
    lengths = sorted(length for text in texts.values() for length in function_lengths(text))
    logic = sum(count for count, _ in counts.values())
    folders = Counter(path.parent for path in texts if path.name != "__init__.py")
    short = [
        str(path.relative_to(root))
        for path, text in texts.items()
        if 0 < len(text.splitlines()) < 40 and path.name not in ("__init__.py", "__main__.py")
    ]
    hard = [(path, counts[path]) for path in map(root.joinpath, HARD_BODIES) if path in counts]
    hard_logic = sum(logic for _, (logic, _) in hard)
    hard_comments = sum(comments for _, (_, comments) in hard)
    lines = [
        f"lines of logic       {logic:,} in {len(texts)} files",
        f"functions            {len(lengths)}: median {statistics.median(lengths):.0f}, "
        f"p95 {lengths[int(0.95 * len(lengths))]}, longest {lengths[-1]} lines",
        f"longest file         {max(len(text.splitlines()) for text in texts.values())} lines",
        f"files under 40 lines {len(short)}: {', '.join(short)}",
        f"comments             {100 * sum(c for _, c in counts.values()) / logic:.1f} "
        "per 100 lines of logic",
        f"in the hard bodies   {100 * hard_comments / max(hard_logic, 1):.1f} "
        f"({', '.join(f'{p.stem} {100 * c / max(n, 1):.0f}' for p, (n, c) in hard)})",
        "files per folder",
    ]
    lines += [f"  {folder.relative_to(root)!s:20} {n}" for folder, n in sorted(folders.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(Path(sys.argv[1] if len(sys.argv) > 1 else "src/openpalm")))
