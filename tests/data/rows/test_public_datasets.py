"""Public shapes of rows: a thousand altered rows of each, and a reader of the published format.

Each altered row is used, left out or refused with its line. A used row says what the small readers
here find in it, and every text of it is in the example or in a field that is named.
"""

import json
import random
import re

import pytest

from openpalm.data.rows.preferences import Pair, Rating
from openpalm.data.rows.readers.demonstrations import read_demonstrations
from openpalm.data.rows.readers.pairs import read_pairs, read_ties
from openpalm.data.rows.readers.prompts import read_prompts
from openpalm.data.rows.readers.ratings import read_ratings
from openpalm.errors import DataError

WORD = re.compile(r"\bw\d+\b")


def turns(*texts, who="role", what="content", names=("user", "assistant")):
    return [{who: names[i % 2], what: text} for i, text in enumerate(texts)]


def user_assistant(row, **keys):
    return [
        ({"human": "user", "gpt": "assistant"}.get(t[keys["who"]], t[keys["who"]]), t[keys["what"]])
        for t in row
    ]


# Every shape: a row as published, and what a reader of that format sees in it: for pairs
# (prompt, chosen, rejected), for conversations the turns, for ratings (prompt, answer, number).


def openai_chat(w):
    return {"messages": turns(w(), w(), w(), w())}


def sees_chat(row):
    if any("weight" in turn for turn in row["messages"]):
        return None
    return [(turn["role"], turn["content"]) for turn in row["messages"]]


def sharegpt(w):
    named = turns(w(), w(), who="from", what="value", names=("human", "gpt"))
    return {"id": w(), "conversations": named}


def sees_sharegpt(row):
    return user_assistant(row["conversations"], who="from", what="value")


def alpaca(w):
    return {"instruction": w(), "input": w(), "output": w()}


def sees_alpaca(row):
    asked = "\n\n".join(part for part in (row["instruction"], row["input"]) if part.strip())
    return [("user", asked), ("assistant", row["output"])]


def dolly(w):
    return {"instruction": w(), "context": w(), "response": w(), "category": w()}


def sees_dolly(row):
    asked = "\n\n".join(part for part in (row["instruction"], row["context"]) if part.strip())
    return [("user", asked), ("assistant", row["response"])]


def hh(w):
    start = f"\n\nHuman: {w()}\n\nAssistant: {w()}\n\nHuman: {w()}\n\nAssistant: "
    return {"chosen": start + w(), "rejected": start + w()}


def sees_hh(row):
    sides = []
    for side in ("chosen", "rejected"):
        parts = re.split(r"\n\n(Human|Assistant): ?", row[side])
        assert not parts[0]
        names = ["user" if who == "Human" else "assistant" for who in parts[1::2]]
        sides.append(list(zip(names, parts[2::2], strict=True)))
    chosen, rejected = sides
    assert len(chosen) == len(rejected)
    assert chosen[:-1] == rejected[:-1]
    return chosen[:-1], [chosen[-1]], [rejected[-1]]


def ultrafeedback(w):
    completions = [
        {
            "model": w(),
            "response": w(),
            "critique": w(),
            "overall_score": s,
            "fine-grained_score": f,
        }
        for s, f in ((10.0, 1.5), (8.5, 4.25))
    ]
    return {"source": w(), "instruction": w(), "models": [w(), w()], "completions": completions}


def sees_ultrafeedback(row):
    worse, better = sorted(row["completions"], key=lambda c: c["fine-grained_score"])
    assert better["fine-grained_score"] > worse["fine-grained_score"]
    sides = [[("assistant", side["response"])] for side in (better, worse)]
    return [("user", row["instruction"])], *sides


def binarized(w):
    asked, good = w(), w()
    return {
        "prompt": asked,
        "prompt_id": w(),
        "chosen": turns(asked, good),
        "rejected": turns(asked, w()),
        "messages": turns(asked, good),
        "score_chosen": 8.5,
        "score_rejected": 3.0,
    }


def sees_binarized(row):
    assert row["chosen"][0] == row["rejected"][0] == turns(row["prompt"])[0]
    sides = [[(t["role"], t["content"]) for t in row[side][1:]] for side in ("chosen", "rejected")]
    return [("user", row["prompt"])], *sides


def shp(w):
    return {
        "post_id": w(),
        "history": w(),
        "human_ref_A": w(),
        "human_ref_B": w(),
        "labels": 0,
        "score_ratio": 2.0,
    }


def sees_shp(row):
    assert type(row["labels"]) is int
    order = {1: "AB", 0: "BA"}[row["labels"]]
    sides = [[("assistant", row[f"human_ref_{side}"])] for side in order]
    return [("user", row["history"])], *sides


def helpsteer(w):
    prompt = f"{w()}\n<extra_id_1>Assistant\n{w()}\n<extra_id_1>User\n{w()}"
    axes = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    return {"prompt": prompt, "response": w()} | {axis: i for i, axis in enumerate(axes)}


def sees_helpsteer(row):
    parts = row["prompt"].split("\n<extra_id_1>")
    prompt = [("user", parts[0])]
    for part in parts[1:]:
        who, _, text = part.partition("\n")
        prompt.append((who.lower(), text))
    return prompt, [("assistant", row["response"])], row["helpfulness"]


def arena(w):
    asked = w()
    return {
        "question_id": w(),
        "model_a": w(),
        "model_b": w(),
        "winner": "model_b",
        "conversation_a": turns(asked, w()),
        "conversation_b": turns(asked, w()),
        "turn": 1,
    }


def sees_arena(row):
    order = {"model_a": "ab", "model_b": "ba"}[row["winner"]]
    both = [[(t["role"], t["content"]) for t in row[f"conversation_{side}"]] for side in order]
    assert both[0][0] == both[1][0]
    return both[0][:1], both[0][1:], both[1][1:]


def kaggle(w):
    rows = {name: json.dumps([w()]) for name in ("prompt", "response_a", "response_b")}
    return rows | {"id": 7, "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}


def sees_kaggle(row):
    order = {(1, 0, 0): "ab", (0, 1, 0): "ba"}[
        tuple(row[f"winner_{name}"] for name in ("model_a", "model_b", "tie"))
    ]
    [asked] = json.loads(row["prompt"])
    sides = [[("assistant", *json.loads(row[f"response_{side}"]))] for side in order]
    return [("user", asked)], *sides


def openai_pair(w):
    return {
        "input": {"messages": turns(w(), w(), w()), "tools": [], "parallel_tool_calls": True},
        "preferred_output": [{"role": "assistant", "content": w()}],
        "non_preferred_output": [{"role": "assistant", "content": w()}],
    }


def sees_openai_pair(row):
    lists = (row["input"]["messages"], row["preferred_output"], row["non_preferred_output"])
    assert not row["input"].get("tools")
    return tuple([(turn["role"], turn["content"]) for turn in messages] for messages in lists)


def oasst(w):
    replies = [
        {"message_id": w(), "role": "assistant", "text": w(), "rank": rank, "replies": []}
        for rank in (1, 0)
    ]
    root = {"message_id": w(), "role": "prompter", "text": w(), "replies": replies}
    return {"message_tree_id": w(), "tree_state": "ready", "prompt": root}


def sees_oasst(row):
    root = row["prompt"]
    assert root["role"] == "prompter"
    assert all(reply["role"] == "assistant" and not reply["replies"] for reply in root["replies"])
    best, worst = sorted(root["replies"], key=lambda reply: reply["rank"])
    assert best["rank"] < worst["rank"]
    return [("user", root["text"])], [("assistant", best["text"])], [("assistant", worst["text"])]


def argilla(w):
    answer = [{"value": 4, "user_id": w(), "status": "submitted"}]
    return {
        "id": w(),
        "fields": {"prompt": w(), "response": w()},
        "responses": {"rating": answer},
        "metadata": {"topic": w()},
    }


def sees_argilla(row):
    fields, [answer] = row["fields"], row["responses"]["rating"]
    assert answer["status"] == "submitted"
    return [("user", fields["prompt"])], [("assistant", fields["response"])], answer["value"]


def label_studio(w):
    result = {
        "from_name": "better",
        "to_name": "answer1,answer2",
        "type": "pairwise",
        "value": {"selected": "right"},
    }
    return {
        "id": 1,
        "data": {"prompt": w(), "answer1": w(), "answer2": w()},
        "annotations": [{"id": 3, "result": [result]}],
    }


def sees_label_studio(row):
    [annotation] = row["annotations"]
    [result] = annotation["result"]
    names = {"left": ("answer1", "answer2"), "right": ("answer2", "answer1")}
    assert (result["type"], result["to_name"]) == ("pairwise", "answer1,answer2")
    sides = [[("assistant", row["data"][n])] for n in names[result["value"]["selected"]]]
    return [("user", row["data"]["prompt"])], *sides


def helpful(path):
    """HelpSteer rates several axes; the other shapes have one without a name."""
    named = '"helpfulness"' in path.read_text() and '"ratings"' not in path.read_text()
    return read_ratings(path, "helpfulness" if named else None)


SHAPES = [
    (read_demonstrations, openai_chat, sees_chat),
    (read_demonstrations, sharegpt, sees_sharegpt),
    (read_demonstrations, alpaca, sees_alpaca),
    (read_demonstrations, dolly, sees_dolly),
    (read_pairs, hh, sees_hh),
    (read_pairs, ultrafeedback, sees_ultrafeedback),
    (read_pairs, binarized, sees_binarized),
    (read_pairs, shp, sees_shp),
    (helpful, helpsteer, sees_helpsteer),
    (read_pairs, arena, sees_arena),
    (read_pairs, kaggle, sees_kaggle),
    (read_pairs, openai_pair, sees_openai_pair),
    (read_pairs, oasst, sees_oasst),
    (read_ratings, argilla, sees_argilla),
    (read_pairs, label_studio, sees_label_studio),
]


def contents(messages):
    return [(m.role, m.content) for m in messages]


def shown(item):
    """An item in the words of the readers above."""
    if isinstance(item, Pair):
        return contents(item.prompt), contents(item.chosen), contents(item.rejected)
    if isinstance(item, Rating):
        return contents(item.prompt), contents(item.completion), item.value
    return contents(item)


ASKED = ("system", "context", "input", "instruction", "question", "tools", "images", "history")
"""Added as a field, these must reach the model or stop the row."""


def places(value, path=()):
    """Every object and list in a row, with the key of each thing in it."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def altered(row, rng, word):
    """The row with one or two changes; whether a field was added that the model should see."""
    added = False
    for _ in range(rng.choice((1, 1, 2))):
        holder, key = rng.choice(list(places(row)))
        change = rng.choice(("drop", "rename", "empty", "type", "add", "ask", "turn", "weight"))
        if change == "drop":
            del holder[key]
        elif change == "rename" and isinstance(holder, dict):
            name = rng.choice((f"{key}_2", "extra", "system_prompt"))
            holder[name] = holder.pop(key)
            added |= name == "system_prompt"
        elif change == "empty":
            holder[key] = rng.choice(("", " ", [], None))
        elif change == "type":
            holder[key] = rng.choice((7, True, {"a": word()}, [word()], 1.5, word()))
        elif change == "add":
            row[rng.choice(("source", "meta", "language"))] = word()
        elif change == "ask":
            row[rng.choice(ASKED)] = rng.choice((word(), [word()]))
            added = True
        elif change == "turn" and isinstance(holder, list) and isinstance(holder[0], dict):
            holder.insert(rng.randrange(len(holder) + 1), dict(rng.choice(holder)))
        elif change == "weight" and isinstance(holder, dict):
            holder["weight"] = rng.choice((0, 1, 0.5))
        if not row or not list(places(row)):
            break
    return added


def expected(sees, row):
    """What the reader of the published format finds; None where the row is not of that format."""
    try:
        found = sees(json.loads(json.dumps(row)))
        json_texts = re.findall(r'"\s*"', json.dumps(found))
        return None if found is None or json_texts else json.loads(json.dumps(found))
    except (AssertionError, KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None


def check_nothing_is_lost(row, found):
    """Every word of the row is in an item, or in a field that is named as not used."""
    in_items = set(WORD.findall(repr([shown(item) for item in found.items]).replace("\\n", " ")))
    named = {name.split(".")[-1] for name in found.unused_fields}

    def lost(value, key):
        if key in named:
            return set()
        if isinstance(value, dict):
            return set().union(*(lost(inner, name) for name, inner in value.items()))
        if isinstance(value, list):
            return set().union(*(lost(inner, None) for inner in value))
        return set(WORD.findall(value)) - in_items if isinstance(value, str) else set()

    return lost(row, None)


def outcome(read, path):
    try:
        return read(path), ""
    except DataError as error:
        return None, str(error)


@pytest.mark.parametrize(("read", "make", "sees"), SHAPES, ids=[s[1].__name__ for s in SHAPES])
def test_a_thousand_altered_rows(read, make, sees, tmp_path):
    rng, path = random.Random(make.__name__), tmp_path / "rows.jsonl"
    outcomes = {"used": 0, "left out": 0, "refused": 0, "compared": 0}
    for number in range(1000):
        count = iter(range(10**6))

        def word(count=count):
            return f"w{next(count)}"

        row = make(word)
        added = altered(row, rng, word) if number else False
        path.write_text(json.dumps(row) + "\n")
        found, error = outcome(read, path)
        if found is None:
            empty = "no rating can be used: " in error and "line 1)" in error
            outcomes["left out" if empty else "refused"] += 1
            assert empty or error.startswith((f"{path}:1: ", "--axis"))
            continue
        if not found.items:
            outcomes["left out"] += 1
            assert found.unused
            assert {place for where in found.unused_places.values() for place in where} == {
                f"{path}:1"
            }
            continue
        outcomes["used"] += 1
        wanted = None if added else expected(sees, row)
        if wanted is not None and len(found.items) == 1 and "weight" not in json.dumps(row):
            outcomes["compared"] += 1
            assert json.loads(json.dumps(shown(found.items[0]))) == wanted, row
        lost = check_nothing_is_lost(row, found)
        assert not lost, (row, found)
    assert min(outcomes.values()) >= 10, outcomes


@pytest.mark.parametrize("flat", [False, True])
def test_oasst_conversations_train_every_reply_once(tmp_path, flat):
    def message(name, role, parent, **more):
        ids = {"message_id": name, "parent_id": parent, "message_tree_id": "a"}
        return ids | {"role": role, "text": f"text {name}"} | more

    rows = [
        message("d", "assistant", "c"),
        message("a", "prompter", None),
        message("b", "assistant", "a"),
        message("c", "prompter", "b"),
        message("e", "assistant", "c"),
        message("f", "assistant", "a", deleted=True),
    ]
    if not flat:
        by_name = {row["message_id"]: row | {"replies": []} for row in rows}
        for row in by_name.values():
            if row["parent_id"]:
                by_name[row["parent_id"]]["replies"].append(row)
        rows = [{"message_tree_id": "a", "prompt": by_name["a"]}]
    path = tmp_path / "trees.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read_demonstrations(path).items
    assert contents(first) == list(
        zip(("user", "assistant") * 2, (f"text {name}" for name in "abcd"), strict=True)
    )
    assert contents(second)[-1] == ("assistant", "text e")
    learnt = [m.content for talk in (first, second) for m in talk if m.trained]
    assert [text for text in learnt if text[-1] in "bdef"] == ["text b", "text d", "text e"]
    asked = read_prompts(path).items
    assert [row.prompt[-1].content for row in asked] == ["text a", "text c"]


TIES = {
    "arena": (arena, sees_arena, {"winner": "model_a"}, {"winner": "tie"}, {"winner": "both_bad"}),
    "kaggle": (kaggle, sees_kaggle, {}, {"winner_model_a": 0, "winner_tie": 1}, None),
}


@pytest.mark.parametrize("name", TIES)
def test_ties_of_public_data_sets(name, tmp_path):
    """A tie has the prompt and answers of the same row where the first answer won."""
    make, sees, won, tied, bad = TIES[name]
    numbers = iter(range(1000))
    rows = [make(lambda: f"w{next(numbers)}") for _ in range(4)]
    expected = [sees(row | won) for row in rows[:2]]
    path = tmp_path / "rows.jsonl"
    given = [rows[0] | tied, rows[2] | won, rows[1] | tied, rows[3] | (bad or won)]
    path.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    found = [tuple([(m.role, m.content) for m in part] for part in tie) for tie in read_ties(path)]
    assert found == expected
    pairs = read_pairs(path)
    assert pairs.unused == {"tie": 2} | ({"both bad": 1} if bad else {})
    assert len(pairs.items) == (1 if bad else 2)


@pytest.mark.parametrize(
    ("field", "sides", "prompt"),
    [
        ("preference_strength", ("response_1", "response_2"), {"prompt": "w1"}),
        ("overall_preference", ("response1", "response2"), {"context": turns("w1")}),
    ],
)
def test_a_preference_of_strength_0_is_a_tie(field, sides, prompt, tmp_path):
    path = tmp_path / "rows.jsonl"
    row = prompt | dict(zip(sides, ("w2", "w3"), strict=True))
    lines = [json.dumps(row | {field: strength}) + "\n" for strength in (0, -2)]
    path.write_text("".join(lines), encoding="utf-8")
    (tie,) = read_ties(path)
    assert [[m.content for m in part] for part in tie] == [["w1"], ["w2"], ["w3"]]
    (pair,) = read_pairs(path).items
    assert [m.content for m in pair.chosen] == ["w2"]
