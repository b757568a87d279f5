"""The format of a row is recognised by its keys; rows become examples; wrong rows are refused."""

import gzip
import json

import pytest
from data_samples import shared_file

from openpalm.data.rows.preferences import LabelledCompletion, Pair
from openpalm.data.rows.readers.demonstrations import read_demonstrations
from openpalm.data.rows.readers.labelled_completions import read_labelled_completions
from openpalm.data.rows.readers.pairs import read_pairs, read_ties
from openpalm.data.rows.readers.prompts import PromptRow, read_prompts
from openpalm.data.rows.row_formats import row_format
from openpalm.data.text.conversation import Message
from openpalm.errors import DataError

SKY = (Message("user", "Why is the sky blue?"),)
BLUE = (Message("assistant", "Air scatters blue light most."),)
SYSTEM = Message("system", "Be brief.")


def turns(*messages, who="role", what="content", names=None):
    return [{who: (names or {}).get(m.role, m.role), what: m.content} for m in messages]


def sharegpt(*messages):
    return turns(*messages, who="from", what="value", names={"user": "human", "assistant": "gpt"})


def record(kind="write", payload=None, **changes):
    return {
        "id": "p1",
        "prompt": turns(*SKY),
        "candidates": [{"text": "A."}, {"text": "B."}],
        "kind": kind,
        "payload": payload or {"text": BLUE[0].content},
        "author": "ann",
        "author_kind": "person",
        "created": "2026-01-31T12:00:00Z",
    } | changes


CONVERSATION = {"messages": turns(*SKY, *BLUE), "source": "a forum"}
SHAREGPT = {"id": "identity_0", "conversations": sharegpt(*SKY, *BLUE)}
ALPACA = {"instruction": SKY[0].content, "input": "", "output": BLUE[0].content}
COMPLETION = {"prompt": SKY[0].content, "completion": BLUE[0].content}
PROBLEM = {"question": SKY[0].content, "answer": BLUE[0].content}
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
HH = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
RANKING = {"prompt": "q", "responses": ["a", "b"], "rank": [1, 2]}
LABELLED = {"prompt": "q", "completion": "a", "label": True}
RATING = {"prompt": "q", "response": "a", "rating": 4}
PROMPT = {"prompt": "What is 6 x 7?", "difficulty": 1}


@pytest.fixture
def save(tmp_path):
    def write(*rows, name="rows.jsonl"):
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write


# --- what fine-tuning imitates


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (CONVERSATION, SKY + BLUE),
        ({"messages": turns(SYSTEM, *SKY, *BLUE, *SKY)}, (SYSTEM, *SKY, *BLUE, *SKY)),
        ({"system": "Be brief.", **CONVERSATION}, (SYSTEM, *SKY, *BLUE)),
        (SHAREGPT, SKY + BLUE),
        ({"conversations": sharegpt(SYSTEM, *SKY, *BLUE)}, (SYSTEM, *SKY, *BLUE)),
        ({"conversations": turns(*SKY, *BLUE)}, SKY + BLUE),
        ({"system": "Be brief.", **SHAREGPT}, (SYSTEM, *SKY, *BLUE)),
        (ALPACA, SKY + BLUE),
        (
            {"instruction": "Add.", "input": "2 and 3", "output": "5", "text": "Below is ..."},
            (Message("user", "Add.\n\n2 and 3"), Message("assistant", "5")),
        ),
        (COMPLETION, SKY + BLUE),
        ({"prompt": SKY[0].content, "response": BLUE[0].content}, SKY + BLUE),
        ({"prompt": turns(SYSTEM, *SKY), "completion": turns(*BLUE)}, (SYSTEM, *SKY, *BLUE)),
        (
            {"system_prompt": "Be brief.", "question": SKY[0].content, "response": "Air."},
            (SYSTEM, *SKY, Message("assistant", "Air.")),
        ),
        (PROBLEM, SKY + BLUE),
        ({"prompt": SKY[0].content, "answer": 42}, (*SKY, Message("assistant", "42"))),
        ({"problem": SKY[0].content, "solution": "x"}, (*SKY, Message("assistant", "x"))),
        (record(), SKY + BLUE),
        (record("edit", {"candidate": 0, "text": "C."}), (*SKY, Message("assistant", "C."))),
    ],
)
def test_every_format_of_a_demonstration(save, row, expected):
    assert read_demonstrations(save(row)).items == [expected]
    once_more = row | {"id": "p2"} if "kind" in row else row
    packed = save(row, "", once_more, name="rows.jsonl.gz")
    assert read_demonstrations(packed)[:2] == ([expected] * 2, {})


def test_unusable_rows_are_counted_by_reason(save):
    silent, empty = {"messages": turns(*SKY)}, {"messages": turns(*SKY, Message("assistant", " "))}
    found = read_demonstrations(save(CONVERSATION, silent, empty, silent, {"messages": []}))
    assert found[:2] == ([SKY + BLUE], {"no assistant turn": 3, "empty completion": 1})
    assert read_demonstrations(save(ALPACA, ALPACA | {"output": ""})).unused == {
        "empty completion": 1
    }
    thumb = record("thumb", {"up": True, "candidate": 0}, id="p2")
    found = read_demonstrations(save(record(), thumb))
    assert found[:2] == ([SKY + BLUE], {"thumb gives no demonstration": 1})


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (PAIR, "this row is prompt, chosen, rejected, which `openpalm dpo` reads"),
        ({"chosen": [], "rejected": []}, "is whole conversations, which `openpalm dpo` reads"),
        (HH, "this row is Anthropic HH texts, which `openpalm dpo` reads"),
        (RANKING, "this row is prompt, responses, ranking, which `openpalm dpo` reads"),
        (LABELLED, "prompt, completion, label, which `openpalm dpo --loss kto` reads"),
        (RATING, "this row is prompt, response, rating, which `openpalm reward` reads"),
        (LABELLED | {"label": 0.5}, "which `openpalm reward` reads"),
        (PROMPT, "this row is a prompt alone, which `openpalm grpo` reads"),
        ({"text": "Once"}, "this row is a text, which `openpalm data prepare` reads"),
        ({"q\n": 1}, r"fields \('q\\n'\) match no known format; conversations are one of: "),
        ({}, r"fields \(none\) match no known format"),
        ({"messages": None, "prompt": None}, "match no known format"),
        ({"messages": "hi"}, "field \"messages\" is 'hi'; it must be a list"),
        ({"messages": [7]}, r'field "messages\[0\]" is 7'),
        ({"messages": [{"role": "owl", "content": "x"}]}, "role\" is 'owl'; it must be one of sys"),
        ({"messages": [{"role": "user", "content": None}]}, r'"messages\[0\].content" is missing'),
        ({"conversations": 7}, 'field "conversations" is 7; it must be a list of messages'),
        ({"conversations": ["a"]}, r"field \"conversations\[0\]\" is 'a'"),
        ({"conversations": [{"value": "a"}]}, r'"conversations\[0\].role" is missing'),
        ({"conversations": [{"from": "owl", "value": ""}]}, r"from\" is 'owl'; it must be one of"),
        ({"conversations": [{"from": {}, "value": ""}]}, 'from" is a dict'),
        ({"conversations": [{"from": "gpt"}]}, r'"conversations\[0\].value" is missing'),
        (ALPACA | {"instruction": 7}, 'field "instruction" is 7; it must be a list of'),
        (ALPACA | {"input": ["a"]}, 'field "input" is a list; it must be a text'),
        (ALPACA | {"output": 7}, 'field "output" is 7; it must be a list of'),
        (ALPACA | {"system": 7}, 'field "system" is 7; it must be a text or null'),
        (COMPLETION | {"prompt": 7}, 'field "prompt" is 7'),
        (COMPLETION | {"completion": 7}, 'field "completion" is 7'),
        ({"prompt": "q", "response": {}}, 'field "response" is a dict'),
        (PROBLEM | {"answer": True}, 'field "answer" is True; it must be a text or a number'),
        ('{"question": "q", "answer": NaN}', 'field "answer" is nan; it must be a text or a num'),
        ('{"messages": ' + "[" * 10**6, "JSON nested too deeply"),
        ('{"messages": ' + "[" * 300 + "]" * 300 + "}", r'"messages\[0\]" is a list'),
        (r'{"prompt": "\ud800", "completion": "a"}', "half a surrogate pair"),
        ("[1]", "a JSON list, not an object"),
        (record(author=7), 'field "author" is 7'),
    ],
)
def test_rows_that_fine_tuning_refuses(save, row, says):
    path = save(CONVERSATION if "messages" in row else "", row)
    with pytest.raises(DataError, match=says) as error:
        read_demonstrations(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert "\n" not in str(error.value)


def test_one_file_has_one_format(save):
    with pytest.raises(DataError, match=r":2: this row is .*, the first is messages; split the f"):
        read_demonstrations(save(CONVERSATION, SHAREGPT))


def test_empty_files(save, tmp_path):
    with pytest.raises(DataError, match="is empty; give a file with at least one conversation"):
        read_demonstrations(save("", ""))
    with pytest.raises(
        DataError, match=r"labelled completions are read from \.jsonl or \.jsonl\.gz"
    ):
        read_labelled_completions(tmp_path / "rows.csv")
    with pytest.raises(DataError, match="no such file"):
        read_prompts(tmp_path / "none.jsonl")


FORMATS = [
    (record(), "a Preference record"),
    (PAIR, "prompt, chosen, rejected"),
    (HH, "Anthropic HH texts"),
    (RANKING, "prompt, responses, ranking"),
    (LABELLED, "prompt, completion, label"),
    (RATING, "prompt, response, rating"),
    (CONVERSATION, "messages"),
    (SHAREGPT, "ShareGPT conversations"),
    (ALPACA, "instruction, input, output"),
    (COMPLETION, "prompt, completion"),
    (PROBLEM, "question, answer"),
    (PROMPT, "a prompt alone"),
    ({"text": "Once"}, "a text"),
]


def check_all_keys_count(row_format):
    """Whatever the order of the keys, and with null fields of other formats."""
    for row, name in FORMATS:
        assert row_format(row) == name
        assert row_format(dict(reversed(row.items()))) == name
        null = dict.fromkeys(key for other, _ in FORMATS for key in other)
        assert row_format(null | row) == name


def test_all_keys_count():
    check_all_keys_count(row_format)
    firsts = {next(iter(row)): name for row, name in FORMATS}
    with pytest.raises(AssertionError):
        check_all_keys_count(lambda row: firsts[next(iter(row))])
    with pytest.raises(AssertionError):
        check_all_keys_count(lambda row: row_format({k: v or "" for k, v in row.items()}))


def test_gsm8k_is_questions_and_answers():
    path = shared_file("gsm8k-train-2000.jsonl")
    found, unused = read_demonstrations(path)[:2]
    assert (len(found), unused) == (2000, {})
    assert found[0][0].content.startswith("Natalia sold clips")
    assert found[0][1].content.endswith("#### 72")
    prompt, row = read_prompts(path).items[0]
    assert prompt == found[0][:1]
    assert row["answer"] == found[0][1].content


# --- rankings


def say(text):
    return (Message("assistant", text),)


Q = (Message("user", "q"),)


@pytest.mark.parametrize(
    "order",
    [{"rank": [3, 1, 2.5]}, {"rank": [9, -1, 0]}, {"ranking": [1, 2, 0]}, {"ranking": [[1], 2, 0]}],
)
def test_rankings_become_pairs(save, order):
    row = {"prompt": "q", "answers": ["worst", "best", "middle"], **order}
    found = read_pairs(save(row))
    both = [("best", "middle"), ("best", "worst"), ("middle", "worst")]
    assert found[:2] == ([Pair(Q, say(a), say(b)) for a, b in both], {})


def test_ties_of_a_ranking_are_counted(save):
    texts = {"prompt": "q", "responses": ["a", "b", "c", "a"]}
    for order in ({"rank": [1, 2, 2, 2]}, {"ranking": [0, [1, 2, 3]]}):
        found, unused = read_pairs(save(texts | order))[:2]
        assert [pair.rejected for pair in found] == [say("b"), say("c")]
        assert unused == {"tie": 3, "equal completions": 1}
        ties = read_ties(save(texts | order))
        assert [tie[1:] for tie in ties] == [
            (say("b"), say("c")),
            (say("b"), say("a")),
            (say("c"), say("a")),
        ]


def test_equal_scores_are_ties(save):
    path = save({"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 2, 1]})
    assert [tie[1:] for tie in read_ties(path)] == [(say("a"), say("c"))]
    assert read_pairs(path).unused == {"tie": 1}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"responses": "ab"}, "field \"responses\" is 'ab'; it must be a list of two or more"),
        ({"responses": ["a"]}, 'field "responses" is a list; it must be a list of two'),
        ({"responses": ["a", 7]}, r'field "responses\[1\]" is 7'),
        ({"rank": [1]}, 'field "rank" is a list; it must be 2 numbers, the rank of each'),
        ({"rank": [1, "2"]}, 'field "rank" is a list'),
        ({"rank": [1, float("nan")]}, 'field "rank" is a list'),
        ({"rank": 1}, 'field "rank" is 1'),
        ({"ranking": [1, 2]}, "the numbers 0 to 1 of the responses, best first; write the rank"),
        ({"ranking": [0, 0]}, 'field "ranking" must be'),
        ({"ranking": [0, True]}, 'field "ranking" must be'),
        ({"ranking": [0, [[1]]]}, 'field "ranking" must be'),
        ({"ranking": {"a": 1}}, 'field "ranking" must be'),
    ],
)
def test_invalid_rankings(save, change, says):
    path = save(RANKING | change)
    with pytest.raises(DataError, match=says) as error:
        read_pairs(path)
    assert str(error.value).startswith(f"{path}:1: field ")


def test_the_error_names_the_verb_that_reads_a_row(save):
    with pytest.raises(DataError, match=r"is messages, which `openpalm sft` reads; pairs are one"):
        read_pairs(save(CONVERSATION))


# --- verdicts


def test_labelled_completions(save):
    rows = [
        LABELLED,
        {"prompt": turns(*SKY), "completion": turns(*BLUE), "label": False},
        {"prompt": "q", "response": "b", "label": False, "score": 1},
    ]
    expected = [
        LabelledCompletion(Q, say("a"), True),
        LabelledCompletion(SKY, BLUE, False),
        LabelledCompletion(Q, say("b"), False),
    ]
    assert read_labelled_completions(save(*rows))[:2] == (expected, {})
    thumb = record("thumb", {"up": False, "candidate": 1})
    found = read_labelled_completions(save(thumb, record(id="p2")))
    assert found[:2] == (
        [LabelledCompletion(SKY, say("B."), False)],
        {"write gives no labelled completion": 1},
    )


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            LABELLED | {"label": 1},
            "which `openpalm reward` reads; labelled completions are one of: prompt",
        ),
        (LABELLED | {"label": None}, "this row is prompt, completion, which `openpalm sft` reads"),
        (LABELLED | {"prompt": 7}, 'field "prompt" is 7'),
    ],
)
def test_rows_that_are_not_labelled_completions(save, row, says):
    with pytest.raises(DataError, match=says):
        read_labelled_completions(save(row))


# --- prompts


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (PROMPT, (Message("user", PROMPT["prompt"]),)),
        ({"prompt": turns(SYSTEM, *SKY), "answer": 42}, (SYSTEM, *SKY)),
        (PROBLEM, SKY),
        (COMPLETION, SKY),
        (LABELLED, Q),
        (RATING, Q),
        (PAIR, Q),
        (RANKING, Q),
        (ALPACA, SKY),
        ({"messages": turns(*SKY)}, SKY),
        (CONVERSATION, SKY),
        ({"messages": turns(*SKY, *BLUE, *Q)}, SKY + BLUE + Q),
        ({"messages": turns(*SKY, *BLUE, *Q, *BLUE)}, SKY + BLUE + Q),
        ({"system": "Be brief.", **SHAREGPT}, (SYSTEM, *SKY)),
    ],
)
def test_every_format_of_a_prompt(save, row, prompt):
    assert read_prompts(save(row, row))[:2] == ([PromptRow(prompt, row)] * 2, {})


def test_prompts_of_records_once_each(save):
    other = record(id="p3", prompt=turns(*Q))
    found, unused = read_prompts(save(record(), record(id="p2"), other))[:2]
    assert [(prompt, row["id"]) for prompt, row in found] == [(SKY, "p1"), (Q, "p3")]
    assert unused == {"repeated prompt": 1}


def test_rows_without_a_prompt(save):
    rows = [CONVERSATION, {"messages": turns(*BLUE)}, {"messages": []}]
    found, unused = read_prompts(save(*rows))[:2]
    assert len(found) == 1
    assert unused == {"no user turn before the last completion": 2}
    found = read_prompts(save({"prompt": turns(*SKY, *BLUE)}))
    assert found[:2] == ([], {"the prompt ends with an assistant turn": 1})
    with pytest.raises(DataError, match="Anthropic HH texts, which `openpalm dpo` reads"):
        read_prompts(save(HH))


# --- other fields of a row of a known format are used, refused or named


@pytest.mark.parametrize(
    ("read", "row"),
    [
        (read_demonstrations, CONVERSATION | {"context": "Mine."}),
        (read_demonstrations, CONVERSATION | {"instruction": "Mine."}),
        (read_demonstrations, {**CONVERSATION, "tools": [{"name": "add"}]}),
        (read_demonstrations, {"system": "Mine.", "messages": turns(SYSTEM, *SKY, *BLUE)}),
        (read_demonstrations, COMPLETION | {"answer": "Mine."}),
        (read_demonstrations, PROBLEM | {"solution": "Mine."}),
        (read_demonstrations, {"prompt": turns(*SKY), "completion": "a", "input": "Mine."}),
        (read_pairs, PAIR | {"messages": turns(*SKY)}),
        (read_pairs, PAIR | {"question": "Mine."}),
        (read_pairs, HH | {"history": "Mine."}),
        (read_prompts, PROMPT | {"images": ["a.png"]}),
        (read_prompts, SHAREGPT | {"instruction": "Mine."}),
    ],
)
def test_a_field_that_would_be_lost_is_refused(save, read, row):
    path = save(row)
    with pytest.raises(DataError, match=r"would not reach the model|have the same role") as error:
        read(path)
    assert str(error.value).startswith(f"{path}:1: field")


def test_known_fields_are_used(save):
    row = {"input": "2 and 3", "history": [["Hi", "Hello"]], "system": "Be brief."}
    [found] = read_demonstrations(save(row | {"instruction": "Add.", "output": "5"})).items
    texts = ["Be brief.", "Hi", "Hello", "Add.\n\n2 and 3", "5"]
    assert [message.content for message in found] == texts
    [pair] = read_pairs(save(PAIR | {"score_chosen": 8.5, "score_rejected": 6})).items
    assert pair.margin == 2.5
    for row in (HH, {"chosen": "The sky is", "rejected": "The sky was"}, PAIR):
        [pair] = read_pairs(save(row | {"system_prompt": "Be brief."})).items
        assert pair.prompt[0] == SYSTEM
        assert pair.prompt[1:] == read_pairs(save(row)).items[0].prompt
    parts = [{"type": "text", "text": "Why"}, {"type": "text", "text": "?"}]
    talk = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    [row] = read_prompts(save({"messages": talk})).items
    assert row.prompt == (SYSTEM, Message("user", "Why?"))


def test_unused_fields_are_named_once(save):
    row = CONVERSATION | {"prompt": SKY[0].content, "messages": turns(*SKY, *BLUE)}
    row["messages"][0]["name"] = "ann"
    found = read_demonstrations(save(row, CONVERSATION))
    assert len(found.items) == 2
    assert found.report() == [
        "2 rows carry fields that are not used: 'source' (2), 'prompt' (1), 'messages[].name' (1)"
    ]


@pytest.mark.parametrize("turn", [{"role": "tool", "content": "5"}, {"tool_calls": [{"id": 1}]}])
def test_turns_of_tools_are_left_out(save, turn):
    talk = turns(*SKY, *BLUE)
    talk.append({"role": "assistant", "content": None} | turn)
    found = read_demonstrations(save(CONVERSATION, {"messages": talk}))
    assert len(found.items) == 1
    [(reason, where)] = found.unused_places.items()
    assert "which the chat template cannot write" in reason
    assert [place.rpartition(":")[2] for place in where] == ["2"]


def test_weights(save):
    talk = turns(*SKY, *BLUE, *SKY, *BLUE)
    talk[1]["weight"], talk[3]["train"] = 0, True
    [found] = read_demonstrations(save({"messages": talk})).items
    assert [message.trained for message in found] == [True, False, True, True]
    for wrong in ({"weight": 0.5}, {"train": "yes"}):
        with pytest.raises(DataError, match="it must be 0 or 1"):
            read_demonstrations(save({"messages": [talk[0], talk[1] | wrong]}))
    with pytest.raises(DataError, match="asks for the loss on a turn of the user"):
        read_demonstrations(save({"messages": [talk[0] | {"weight": 1}, talk[1]]}))
