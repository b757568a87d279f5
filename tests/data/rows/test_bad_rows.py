"""What happens to a bad row is the same for every verb that reads rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from openpalm.data.rows.readers.demonstrations import read_demonstrations
from openpalm.data.rows.readers.labelled_completions import read_labelled_completions
from openpalm.data.rows.readers.pairs import read_pairs
from openpalm.data.rows.readers.prompts import read_prompts
from openpalm.data.rows.readers.ratings import read_ratings
from openpalm.errors import DataError

GOOD: dict[str, tuple[Any, dict[str, Any]]] = {
    "sft": (read_demonstrations, {"prompt": "a", "completion": "b"}),
    "dpo": (read_pairs, {"prompt": "a", "chosen": "b", "rejected": "c"}),
    "kto": (read_labelled_completions, {"prompt": "a", "completion": "b", "label": True}),
    "reward": (read_ratings, {"prompt": "a", "response": "b", "rating": 1}),
    "ppo": (read_prompts, {"prompt": "a"}),
}


def with_second(tmp_path: Path, good: dict[str, Any], line: str) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(good)}\n{line}\n{json.dumps(good)}\n", encoding="utf-8")
    return path


def refusal(tmp_path: Path, verb: str, line: str) -> str:
    read, good = GOOD[verb]
    path = with_second(tmp_path, good, line)
    with pytest.raises(DataError) as caught:
        read(path)
    said = str(caught.value)
    assert said.startswith(f"{path}:2: ")
    assert "\n" not in said
    return said.removeprefix(f"{path}:2: ")


@pytest.mark.parametrize("verb", GOOD)
def test_a_line_that_cannot_be_read_stops_with_line_and_remedy(tmp_path: Path, verb: str):
    last = list(GOOD[verb][1])[-1]
    wrong = refusal(tmp_path, verb, json.dumps(GOOD[verb][1] | {last: [3]}))
    assert wrong.startswith(('field "', "this row is ", "the fields ("))
    assert wrong.endswith("(or remove this line)")
    unknown = refusal(tmp_path, verb, '{"cow": 1}')
    assert unknown.startswith("the fields ('cow') match no known format, the first row is ")
    assert unknown.endswith("; write the same fields (or remove this line)")
    assert refusal(tmp_path, verb, "[1]") == (
        "a JSON list, not an object; each line must be one object"
    )
    assert refusal(tmp_path, verb, "{torn").endswith("; each line must be one object")


@pytest.mark.parametrize("verb", GOOD)
def test_a_row_without_an_example_is_left_out_and_counted(tmp_path: Path, verb: str):
    read, good = GOOD[verb]
    path = with_second(tmp_path, good, json.dumps(good | {"prompt": " "}))
    found = read(path)
    assert len(found.items) == 2
    assert found.report() == ["1 left out: empty prompt (line 2)"]
