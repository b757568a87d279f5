import gzip
import json
from dataclasses import replace

import pytest

from openpalm.data.rows.preferences import (
    Candidate,
    LabelledCompletion,
    Pair,
    Preference,
    Rating,
    Tie,
    demonstrations_from_preferences,
    labelled_completions_from_preferences,
    pairs_from_preferences,
    ratings_from_preferences,
    ties_from_preferences,
)
from openpalm.data.rows.readers.pairs import read_pairs, read_ties
from openpalm.data.text.conversation import Message
from openpalm.errors import DataError

ASK = (Message("user", "Sky?"),)
COMPARE = {"better": 1, "worse": 0, "strength": 2}


def say(text):
    return (Message("assistant", text),)


def talk(*turns):
    """user, assistant, user ... as messages in JSON."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


def judge(kind, payload, texts=("a", "b", "c"), **fields):
    given = {
        "id": "p1",
        "prompt": ASK,
        "candidates": tuple(map(Candidate, texts)),
        "author": "ann",
        "author_kind": "person",
        "created": "2026-01-31T12:00:00Z",
    }
    return Preference(kind=kind, payload=payload, **given | fields)


def rate(number, text, author="ann", **axes):
    payload = {"ratings": axes, "candidate": 0}
    return judge("rate", payload, (text,), id=f"r{number}", author=author)


def save(tmp_path, *rows):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


EVERY = [
    judge("compare", COMPARE),
    judge("compare", {"tie": [0, 2]}, id="p2"),
    judge("compare", {"both_bad": [0, 1]}, id="p3"),
    judge("rank", {"order": [[2], [0, 1]]}, id="p4"),
    judge("rate", {"ratings": {"true": 5, "kind": 4}, "candidate": 2}, id="p5"),
    judge("thumb", {"up": True, "candidate": 1}, id="p6"),
    judge("edit", {"candidate": 0, "text": "A."}, id="p7"),
    judge("write", {"text": "Blue."}, (), id="p8"),
    judge("flag", {"candidate": None, "reason": "spam"}, id="p9"),
]


# --- the record


def test_every_kind_goes_to_json_and_back():
    full = judge(
        "flag",
        {"candidate": 1, "reason": "日本 😀"},
        candidates=(
            Candidate("a", "sha256:1", {"temperature": 0, "stop": ["x"], "seed": None}),
            Candidate(""),
        ),
        prompt=(Message("system", "s"), *ASK),
        elapsed_s=1.25,
        guideline_version="3",
        supersedes="p0",
    )
    for record in [*EVERY, full]:
        written = json.loads(json.dumps(record.to_json()))
        assert written == record.to_json()
        assert Preference.from_json(written, "x:1") == record
    assert Preference.from_json(full.to_json(), "x:1").to_json() == full.to_json()


@pytest.mark.parametrize("kind", ["person", "model", "simulated"])
def test_pairs_do_not_depend_on_the_kind_of_author(kind):
    records = [
        Preference.from_json(judge("compare", COMPARE).to_json() | {"author_kind": kind}, "x:1"),
        replace(rate(1, "a", true=5), author_kind=kind),
        replace(rate(2, "b", true=2), author_kind=kind),
    ]
    assert [record.author_kind for record in records] == [kind] * 3
    pairs = pairs_from_preferences(records).items
    assert pairs == [Pair(ASK, say("b"), say("a"), 2), Pair(ASK, say("a"), say("b"), 3)]


def test_null_fields_may_be_left_out():
    row = EVERY[0].to_json()
    least = {name: value for name, value in row.items() if value is not None}
    least["candidates"] = [{"text": text} for text in "abc"]
    assert Preference.from_json(least, "x:1") == EVERY[0]


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        ("compare", {}),
        ("compare", {"better": 0, "worse": 0, "strength": 1}),
        ("compare", {"better": 0, "worse": 3, "strength": 1}),
        ("compare", {"better": -1, "worse": 0, "strength": 1}),
        ("compare", {"better": True, "worse": 0, "strength": 1}),
        ("compare", {"better": 0, "worse": 1, "strength": 4}),
        ("compare", {"better": 0, "worse": 1, "strength": True}),
        ("compare", {"better": 0, "worse": 1}),
        ("compare", {"better": 0, "worse": 1, "strength": 1, "tie": [0, 1]}),
        ("compare", {"tie": [0]}),
        ("compare", {"tie": [1, 1]}),
        ("compare", {"both_bad": [0, "1"]}),
        ("rank", {"order": []}),
        ("rank", {"order": [[0], [1]]}),
        ("rank", {"order": [[0], [1, 2], []]}),
        ("rank", {"order": [[0], [1, 1, 2]]}),
        ("rank", {"order": [[0], 1, 2]}),
        ("rate", {"ratings": {}, "candidate": 0}),
        ("rate", {"ratings": {"true": 6}, "candidate": 0}),
        ("rate", {"ratings": {"true": 2.5}, "candidate": 0}),
        ("rate", {"ratings": {" ": 2}, "candidate": 0}),
        ("rate", {"ratings": {"true": 2}, "candidate": None}),
        ("thumb", {"up": 1, "candidate": 0}),
        ("thumb", {"up": True, "candidate": 3}),
        ("edit", {"candidate": 0, "text": " "}),
        ("write", {"text": None}),
        ("flag", {"candidate": 3, "reason": "spam"}),
        ("flag", {"candidate": None, "reason": ""}),
    ],
)
def test_invalid_payloads(kind, payload):
    with pytest.raises(DataError, match=f'field "payload" of this {kind} is .* it must be'):
        judge(kind, payload)


def test_a_rank_needs_two_candidates():
    with pytest.raises(DataError, match='"payload"'):
        judge("rank", {"order": [[0]]}, ("a",))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"id": ""}, "field \"id\" is ''; it must be a text that is not blank"),
        ({"prompt": []}, 'field "prompt" is a list'),
        ({"prompt": ()}, 'field "prompt" has no user turn'),
        ({"prompt": (Message("user", " "),)}, 'field "prompt" has no user turn'),
        ({"prompt": ASK + say("x")}, 'field "prompt" ends with an assistant turn'),
        ({"candidates": ["a"]}, 'field "candidates" is a list'),
        ({"candidates": ("a",)}, 'field "candidates" is a tuple'),
        ({"author": None}, 'field "author" is missing'),
        (
            {"author_kind": "robot"},
            "\"author_kind\" is 'robot'; it must be person, model or simulated",
        ),
        ({"author_kind": ["person"]}, 'field "author_kind" is a list'),
        ({"created": "yesterday"}, "field \"created\" is 'yesterday'"),
        ({"created": "2026-01-31T12:00:00"}, 'field "created"'),
        ({"created": 7}, 'field "created" is 7'),
        ({"elapsed_s": -1}, 'field "elapsed_s" is -1; it must be seconds'),
        ({"elapsed_s": True}, 'field "elapsed_s" is True'),
        ({"elapsed_s": float("nan")}, 'field "elapsed_s" is nan'),
        ({"guideline_version": 3}, 'field "guideline_version" is 3'),
        ({"supersedes": "p1"}, 'field "supersedes" is the record\'s own id'),
    ],
)
def test_invalid_fields(fields, says):
    with pytest.raises(DataError, match=says):
        judge("compare", COMPARE, **fields)


@pytest.mark.parametrize("kind", ["like", None, ["rank"]])
def test_unknown_kinds(kind):
    with pytest.raises(DataError, match=r'field "kind" is .* it must be one of compare, rank'):
        judge(kind, {})


def test_what_json_would_change_is_refused():
    with pytest.raises(DataError, match='field "payload" is a dict; it must be a JSON object'):
        judge("compare", {"tie": (0, 1)})
    for sampling in ({1: 2}, {"a": float("nan")}, {"a": {1}}, [1]):
        with pytest.raises(DataError, match='field "sampling"'):
            Candidate("a", sampling=sampling)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match='field "text" is missing'):
        Candidate(None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"score": 1}, "field 'score' is unknown; leave it out"),
        ({"author": None}, 'field "author" is missing'),
        ({"prompt": "Sky?"}, "field \"prompt\" is 'Sky\\?'; it must be a list of messages"),
        ({"prompt": [{"role": "owl"}]}, r'"prompt\[0\].role" is \'owl\''),
        ({"candidates": "ab"}, "field \"candidates\" is 'ab'"),
        ({"candidates": ["a"]}, r'field "candidates\[0\]": is a str; it must be an object'),
        (
            {"candidates": [{"text": "a"}, {"text": 1}]},
            r'field "candidates\[1\]": field "text" is 1',
        ),
        ({"candidates": [{"text": "a", "name": "x"}]}, "field 'name' is unknown"),
        ({"payload": {"better": 0}}, 'field "payload"'),
    ],
)
def test_rows_that_are_not_preference_records(change, says):
    with pytest.raises(DataError, match=says) as error:
        Preference.from_json(EVERY[0].to_json() | change, "j.jsonl:7")
    assert str(error.value).startswith("j.jsonl:7: ")
    with pytest.raises(DataError, match=r"^j\.jsonl:7: is a list; it must be an object with id"):
        Preference.from_json([], "j.jsonl:7")


# --- what it gives


def test_pairs_of_every_kind():
    assert pairs_from_preferences(EVERY)[:2] == (
        [
            Pair(ASK, say("b"), say("a"), 2.0),
            Pair(ASK, say("c"), say("a"), None),
            Pair(ASK, say("c"), say("b"), None),
            Pair(ASK, say("A."), say("a"), None),
        ],
        {
            "tie": 2,
            "both bad": 1,
            "thumb gives no pair": 1,
            "write gives no pair": 1,
            "flag gives no pair": 1,
            "no other rating to compare with": 1,
        },
    )


def test_a_rank_gives_all_pairs_between_groups():
    record = judge("rank", {"order": [[3], [0, 2], [1, 4]]}, "abcde")
    found, unused = pairs_from_preferences([record])[:2]
    contents = [(p.chosen[0].content, p.rejected[0].content) for p in found]
    assert contents == [
        ("d", "a"), ("d", "c"), ("d", "b"), ("d", "e"),
        ("a", "b"), ("a", "e"), ("c", "b"), ("c", "e"),
    ]  # fmt: skip
    assert unused == {"tie": 2}


def test_ratings_at_least_one_apart_make_pairs():
    # Means: a 11/3, b 14/3, c 4; so b over a by exactly 1, and nothing else.
    found = pairs_from_preferences(
        [
            rate(1, "a", x=3, y=4, z=4),
            rate(2, "b", x=4, y=5, z=5),
            rate(3, "c", x=4, y=4, z=4),
        ]
    )
    assert found[:2] == ([Pair(ASK, say("b"), say("a"), 1.0)], {"rating gap below 1": 2})


def test_ratings_are_compared_by_one_author_of_one_prompt_on_the_same_axes():
    other = replace(rate(5, "b", x=5), prompt=(Message("user", "Sea?"),))
    newer = replace(rate(6, "b", x=5), guideline_version="2")
    lonely = [rate(1, "a", x=1), rate(2, "b", "bob", x=5), rate(3, "b", y=5), other, newer]
    assert pairs_from_preferences(lonely)[:2] == ([], {"no other rating to compare with": 5})
    found, unused = pairs_from_preferences(
        [rate(1, "a", x=5), rate(2, "b", x=1), rate(3, "c", x=4)]
    )[:2]
    assert found == [
        Pair(ASK, say("a"), say("b"), 4.0),
        Pair(ASK, say("a"), say("c"), 1.0),
        Pair(ASK, say("c"), say("b"), 3.0),
    ]
    assert unused == {}


def test_unusable_pairs_are_counted():
    records = [
        judge("compare", COMPARE, ("", "b")),
        judge("compare", COMPARE, ("b", "b\n"), id="p2"),
        judge("edit", {"candidate": 0, "text": "a "}, id="p3"),
        rate(1, "a", x=5),
        rate(2, "a", x=1),
    ]
    assert pairs_from_preferences(records)[:2] == (
        [],
        {"empty completion": 1, "equal completions": 3},
    )


def test_ties_of_every_kind(tmp_path):
    found = ties_from_preferences([*EVERY, judge("rank", {"order": [[0, 1, 2]]}, id="p10")])
    assert found.items == [
        Tie(ASK, say("a"), say("c")),
        Tie(ASK, say("a"), say("b")),
        *(Tie(ASK, say(i), say(j)) for i, j in ("ab", "ac", "bc")),
    ]
    assert found.unused["compare gives no tie"] == 2
    path = save(tmp_path, *(record.to_json() for record in EVERY))
    assert read_ties(path) == found.items[:2]
    plain = save(tmp_path, {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Red."})
    assert read_ties(plain) == []


def test_ratings_of_every_kind():
    found, unused = ratings_from_preferences(EVERY)[:2]
    assert found == [Rating(ASK, say("c"), "true", 5), Rating(ASK, say("c"), "kind", 4)]
    assert unused == {
        "compare gives no rating": 3,
        "rank gives no rating": 1,
        "thumb gives no rating": 1,
        "edit gives no rating": 1,
        "write gives no rating": 1,
        "flag gives no rating": 1,
    }


def test_labelled_completions():
    found, unused = labelled_completions_from_preferences(
        [*EVERY, rate(1, "x", x=3), rate(2, "y", x=2, y=3), rate(3, " ", x=1)],
    )[:2]
    assert found == [
        LabelledCompletion(ASK, say("a"), False),
        LabelledCompletion(ASK, say("b"), False),
        LabelledCompletion(ASK, say("c"), True),
        LabelledCompletion(ASK, say("b"), True),
        LabelledCompletion(ASK, say("y"), False),
    ]
    assert unused == {
        "compare gives no labelled completion": 2,
        "rank gives no labelled completion": 1,
        "edit gives no labelled completion": 1,
        "write gives no labelled completion": 1,
        "flag gives no labelled completion": 1,
        "neither good nor bad": 1,
        "empty completion": 1,
    }


def test_demonstrations():
    found, unused = demonstrations_from_preferences(EVERY)[:2]
    assert found == [ASK + say("A."), ASK + say("Blue.")]
    assert sum(unused.values()) == 7
    assert unused["compare gives no demonstration"] == 3


@pytest.mark.parametrize(
    "export",
    [
        pairs_from_preferences,
        ratings_from_preferences,
        labelled_completions_from_preferences,
        demonstrations_from_preferences,
    ],
)
def test_superseded_and_repeated_records_are_not_used(export):
    old = judge("thumb", {"up": True, "candidate": 0})
    newer = replace(old, id="p2", payload={"up": False, "candidate": 0}, supersedes="p1")
    newest = judge("write", {"text": "w"}, id="p3", supersedes="p2")
    for order in ([old, newer, newest], [newest, newer, old]):
        found, unused = export(order)[:2]
        assert unused["superseded"] == 2
        assert found[:2] == ([ASK + say("w")] if export is demonstrations_from_preferences else [])
    again = replace(newest, payload={"text": "other"})
    found, unused = export([newest, again])[:2]
    assert unused["repeated id"] == 1
    assert found[:2] == ([ASK + say("w")] if export is demonstrations_from_preferences else [])
    assert export(iter([]))[:2] == ([], {})


# --- files


def test_reading_our_own_records(tmp_path):
    path = save(tmp_path, *(record.to_json() for record in EVERY))
    found = read_pairs(path)
    assert found[:2] == pairs_from_preferences(EVERY)[:2]
    assert [place.rpartition(":")[2] for place in found.places] == ["1", "4", "4", "7"]
    assert "2 left out: tie (lines 2, 4)" in found.report()


HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Sky?\n\nAssistant:"
HH_ASK = (Message("user", "Hi"), *say("Hello."), *ASK)
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "Sky?", "chosen": "Blue", "rejected": " no"}, ASK, "Blue", " no"),
        ({"prompt": talk("Sky?"), "chosen": "Blue", "rejected": "no"}, ASK, "Blue", "no"),
        (
            {
                "prompt": [SYSTEM, *talk("Sky?")],
                "chosen": talk("", "Blue")[1:],
                "rejected": talk("", "no")[1:],
                "score": 1,
            },
            (Message("system", "Be brief."), *ASK),
            "Blue",
            "no",
        ),
        (  # as in UltraFeedback: the answers repeat the prompt
            {"prompt": "Sky?", "chosen": talk("Sky?", "Blue"), "rejected": talk("Sky?", "no")},
            ASK,
            "Blue",
            "no",
        ),
        (
            {
                "chosen": talk("Hi", "Hello.", "Sky?", "Blue"),
                "rejected": talk("Hi", "Hello.", "Sky?", "no"),
            },
            HH_ASK,
            "Blue",
            "no",
        ),
        (
            {"prompt": None, "chosen": "The sky is black.", "rejected": "The sky is blue."},
            (Message("user", "The sky is"),),
            "black.",
            "blue.",
        ),
        (
            {"chosen": "The sky is", "rejected": "The sky is blue"},
            (Message("user", "The sky"),),
            "is",
            "is blue",
        ),
        ({"chosen": HH + " Blue\n\nso.", "rejected": HH + " Bleu"}, HH_ASK, "Blue\n\nso.", "Bleu"),
        ({"prompt": HH, "chosen": "Blue", "rejected": "no"}, HH_ASK, "Blue", "no"),
    ],
)
def test_every_format(row, prompt, chosen, rejected, tmp_path):
    expected = ([Pair(prompt, say(chosen), say(rejected))] * 2, {})
    assert read_pairs(save(tmp_path, row, row))[:2] == expected
    packed = tmp_path / "pairs.jsonl.gz"
    packed.write_bytes(gzip.compress((json.dumps(row) + "\n\n" + json.dumps(row)).encode()))
    assert read_pairs(packed)[:2] == expected


def test_answers_of_several_turns_and_margins(tmp_path):
    row = {"chosen": talk("Sky?", "a", "b", "c"), "rejected": talk("Sky?", "d"), "margin": 2}
    answer = (*say("a"), Message("user", "b"), *say("c"))
    assert read_pairs(save(tmp_path, row)).items == [Pair(ASK, answer, say("d"), 2.0)]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "q", "chosen": "a"}, 'field "rejected" is missing; write "prompt", "chosen"'),
        ({"prompt": "q", "chosen": None, "rejected": "a"}, 'field "chosen" is missing'),
        ({"prompt": 7, "chosen": "a", "rejected": "b"}, 'field "prompt" is 7; it must be a list'),
        ({"prompt": "q", "chosen": 7, "rejected": "b"}, 'field "chosen" is 7'),
        (
            {"prompt": "q", "chosen": [{"role": "x"}], "rejected": "b"},
            r'field "chosen\[0\].role" is \'x\'',
        ),
        ({"chosen": talk("q", "a"), "rejected": "b"}, "field \"rejected\" is 'b'"),
        ({"chosen": HH + " a", "rejected": "b"}, 'field "rejected" does not begin with "Human:"'),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "1"}, "field \"margin\" is '1'"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 10**400}, 'field "margin"'),
        (EVERY[0].to_json() | {"id": 1}, 'field "id" is 1'),
    ],
)
def test_rows_that_are_not_pairs(row, says, tmp_path):
    path = save(tmp_path, row)
    with pytest.raises(DataError, match=says) as error:
        read_pairs(path)
    assert str(error.value).startswith(f"{path}:1: field ")


BOTH = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (BOTH | {"rejected": "a "}, "equal completions"),
        ({"chosen": "a", "rejected": "a"}, "equal completions"),
        ({"chosen": HH + " a", "rejected": HH + " a"}, "equal completions"),
        (BOTH | {"chosen": " "}, "empty completion"),
        (BOTH | {"rejected": []}, "empty completion"),
        ({"chosen": HH + " a", "rejected": HH}, "empty completion"),
        ({"chosen": "a b", "rejected": ""}, "empty completion"),
        (
            {"chosen": talk("q", "a", "r", "b"), "rejected": talk("q", "a")},
            "the prompt ends with an assistant turn",
        ),
        (BOTH | {"prompt": talk("q", "a")}, "the prompt ends with an assistant turn"),
        (BOTH | {"prompt": " "}, "empty prompt"),
        (BOTH | {"prompt": []}, "empty prompt"),
        (BOTH | {"prompt": [SYSTEM]}, "empty prompt"),
        (
            {"chosen": [SYSTEM, *talk("q", "a")], "rejected": [SYSTEM, *talk("r", "a")]},
            "empty prompt",
        ),
        (BOTH | {"chosen": talk("r", "a")}, "chosen does not begin with an assistant turn"),
        (BOTH | {"rejected": talk("q", "b", "c")}, "rejected does not end with an assistant turn"),
        (
            {"chosen": HH + " a", "rejected": HH + " b\n\nHuman: c"},
            "rejected does not end with an a",
        ),
        (
            {"chosen": "a b", "rejected": "c b"},
            "no prompt, and the completions have no common begin",
        ),
        (
            {"chosen": talk("q", "a"), "rejected": talk("r", "a")},
            "no prompt, and the completions have",
        ),
        (BOTH | {"weight": 0}, "weight is 0"),
    ],
)
def test_unusable_rows_are_left_out(row, reason, tmp_path):
    found = read_pairs(save(tmp_path, row))
    assert not found.items
    [(given, count)] = found.unused.items()
    assert given.startswith(reason)
    assert (count, [place[-2:] for place in found.unused_places[given]]) == (1, [":1"])
    with pytest.raises(DataError, match=r"p\.jsonl: no pair can be used: .* \(1; line 1\)"):
        found.refuse_empty("p.jsonl", "pair")


def test_one_file_has_one_format(tmp_path):
    explicit = {"prompt": "q", "chosen": "a b", "rejected": "a c"}
    rows = [
        EVERY[0].to_json(),
        explicit,
        {"chosen": "a b", "rejected": "a c"},
        {"chosen": talk("q", "a"), "rejected": talk("q", "b")},
        {"chosen": HH + " a", "rejected": HH + " b"},
    ]
    for row in rows:
        for other in rows:
            path = save(tmp_path, row, other)
            if row is other:
                assert read_pairs(path).items
                continue
            with pytest.raises(DataError, match=r":2: this row is .*, the first is .*; split"):
                read_pairs(path)
    assert len(read_pairs(save(tmp_path, explicit, explicit | {"prompt": talk("q")})).items) == 2


def test_files_without_pairs(tmp_path):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(DataError, match="is empty; give a file with at least one pair"):
        read_pairs(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="no such file"):
        read_pairs(str(tmp_path / "b.jsonl"))
    with pytest.raises(DataError, match=r"read from \.jsonl"):
        read_pairs(tmp_path / "c.csv")
