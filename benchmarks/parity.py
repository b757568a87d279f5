"""Prints the parity table: every foreign checkpoint in tests/parity, read right and read wrong.

python benchmarks/parity.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))

from parity_cases import CASES, Case


def wrong(case: Case) -> str:
    """Differences when the file is read as each era that computes something else."""
    found = [f"{era}: {case.difference(case.read(era)):.2g}" for era in case.wrong_eras()]
    return ", ".join(found) or "-"


def main() -> None:
    print("| file | era read as | largest difference | read as a wrong era |")
    print("|---|---|---|---|")
    for case in CASES:
        right = case.read()
        print(f"| {case.file} | {right.era} | {case.difference(right):.1e} | {wrong(case)} |")


if __name__ == "__main__":
    main()
