"""Formats of public data sets, translated into our own row formats (data/rows/row_formats.py).

UltraFeedback, SHP, HelpSteer, LMSYS arena, OASST, Argilla, Label Studio. A translation reads fields
through `Row`, so that unused fields are named or refused as in any row. Sources: the data cards of
openbmb/UltraFeedback, stanfordnlp/SHP, nvidia/HelpSteer2 and HelpSteer3,
lmsys/chatbot_arena_conversations and its Kaggle files, OpenAssistant/oasst1; OpenAI's guide to
preference fine-tuning; the exports of Argilla and Label Studio.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from openpalm.base.typed import expect, is_number
from openpalm.data.rows.fields import Row, is_blank
from openpalm.data.rows.read_result import TiedRow, UnusableRow
from openpalm.errors import DataError, count_of

Rows = Iterator[dict[str, Any]]
AXES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
"""The axes of HelpSteer's ratings, 0 to 4."""
_HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


class PublicFormat(NamedTuple):
    name: str
    fields: frozenset[str]
    """a row with all of these has this format"""
    translate: Callable[[Row, str], Rows]
    """the rows in our formats; the second argument names the examples to read ("pair", ...)"""
    nested: Mapping[str, type]
    """types of fields with common names, which tell this format from other rows"""


def public_format(row: dict[str, Any]) -> PublicFormat | None:
    """The public data set's format of a row, or None."""
    has = {name for name, value in row.items() if value is not None}
    for known in _FORMATS:
        nested = known.nested.items()
        if known.fields <= has and all(isinstance(row[field], kind) for field, kind in nested):
            return known
    return None


def _ultrafeedback(row: Row, what: str) -> Rows:
    """Responses with scores: the mean of the annotations, if there is one.

    Not `overall_score`: it is 10 for some completions that their critique rates 1.
    """
    completions = row.get("completions")
    if len(completions) < 2:
        raise UnusableRow("fewer than two completions")
    fine = all(isinstance(c, dict) and c.get("fine-grained_score") is not None for c in completions)
    field = "fine-grained_score" if fine else "overall_score"
    texts, scores = [], []
    for i, completion in enumerate(completions):
        at = f"completions[{i}]"
        expect(at, completion, "an object with a response", lambda v: isinstance(v, dict))
        texts.append(completion.get("response"))
        scores.append(completion.get(field))
        expect(f"{at}.response", texts[-1], "a text", lambda v: isinstance(v, str))
        expect(f"{at}.{field}", scores[-1], "a number", is_number)
        row.note_unused("completions[]", completion, ("response", field))
    yield {"prompt": row.get("instruction"), "responses": texts, "scores": scores}


def _shp(row: Row, what: str) -> Rows:
    """A post and two comments; labels is 1 if A has more votes."""
    label = row.get("labels")
    expect("labels", label, "0 or 1", lambda v: type(v) is int and v in (0, 1))
    sides = [row.get("human_ref_A"), row.get("human_ref_B")]
    better, worse = sides if label else reversed(sides)
    yield {"prompt": row.get("history"), "chosen": better, "rejected": worse}


def _helpsteer(row: Row, what: str) -> Rows:
    prompt = _helpsteer_prompt(row.get("prompt"))
    ratings = {axis: row.get(axis) for axis in AXES if row.has(axis)}
    yield {"prompt": prompt, "response": row.get("response"), "ratings": ratings}


def _helpsteer_pair(row: Row, what: str) -> Rows:
    """preference_strength: -3 (the first is much better) to 3 (the second is much better)."""
    prompt = _helpsteer_prompt(row.get("prompt"))
    yield _pair_of_strength(row, prompt, ("response_1", "response_2"), "preference_strength")


def _helpsteer3(row: Row, what: str) -> Rows:
    yield _pair_of_strength(
        row, row.get("context"), ("response1", "response2"), "overall_preference"
    )


def _pair_of_strength(
    row: Row, prompt: object, sides: tuple[str, str], field: str
) -> dict[str, Any]:
    strength = row.get(field)
    expect(field, strength, "a number from -3 to 3", lambda v: is_number(v) and abs(v) <= 3)
    first, second = (row.get(side) for side in sides)
    if strength == 0:
        raise TiedRow({"prompt": prompt, "chosen": first, "rejected": second})
    better, worse = (second, first) if strength > 0 else (first, second)
    return {"prompt": prompt, "chosen": better, "rejected": worse, "margin": abs(strength)}


def _helpsteer_prompt(prompt: object) -> object:
    """Splits a prompt with several turns: a line <extra_id_1>User starts each later turn."""
    if not isinstance(prompt, str) or not _HELPSTEER_TURN.search(prompt):
        return prompt
    first, *turns = _HELPSTEER_TURN.split(prompt)
    later = zip(turns[::2], turns[1::2], strict=True)
    both = [("User", first), *later]
    return [{"role": who.lower(), "content": text} for who, text in both]


def _arena(row: Row, what: str) -> Rows:
    sides = [row.get("conversation_a"), row.get("conversation_b")]
    yield _pair_of_winner(row.get("winner"), sides)


def _pair_of_winner(winner: object, sides: list[Any]) -> dict[str, Any]:
    if winner == "tie":
        raise TiedRow({"chosen": sides[0], "rejected": sides[1]})
    if winner in ("tie (bothbad)", "both_bad"):
        raise UnusableRow("both bad")
    wanted = "model_a, model_b, tie or tie (bothbad)"
    expect("winner", winner, wanted, lambda v: v in ("model_a", "model_b"))
    better, worse = sides if winner == "model_a" else reversed(sides)
    return {"chosen": better, "rejected": worse}


def _arena_kaggle(row: Row, what: str) -> Rows:
    """prompt, response_a and response_b are JSON lists of texts, one for each turn."""
    flags = [row.get(f"winner_{side}") for side in ("model_a", "model_b", "tie")]
    if sorted(flags, key=str) != [0, 0, 1]:
        raise DataError('fields "winner_model_a", "winner_model_b" and "winner_tie" name no winner')
    questions = _turn_texts(row, "prompt")
    sides = []
    for field in ("response_a", "response_b"):
        answered = _turn_texts(row, field)
        if len(answered) != len(questions):
            turns = count_of(len(answered), "turn")
            raise DataError(f'field "{field}" has {turns}, "prompt" has {len(questions)}')
        both = zip(questions, answered, strict=True)
        pairs = ((("user", question), ("assistant", answer)) for question, answer in both)
        sides.append([{"role": r, "content": t or ""} for pair in pairs for r, t in pair])
    yield _pair_of_winner(("model_a", "model_b", "tie")[flags.index(1)], sides)


def _turn_texts(row: Row, field: str) -> list[str]:
    value = row.get(field)
    try:
        texts = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        texts = None
    right = isinstance(texts, list) and all(t is None or isinstance(t, str) for t in texts)
    if not isinstance(texts, list) or not right:
        raise DataError(f'field "{field}" must be a JSON list of texts, one a turn')
    return texts


def _openai_pair(row: Row, what: str) -> Rows:
    given = row.get("input")
    expect("input.messages", given.get("messages"), "messages", lambda v: isinstance(v, list))
    if not is_blank(given.get("tools")):
        raise UnusableRow("tools, which the chat template cannot write")
    row.note_unused("input", given, ("messages", "tools"))
    sides = {"chosen": row.get("preferred_output"), "rejected": row.get("non_preferred_output")}
    yield {"prompt": given["messages"], **sides}


# OpenAssistant: trees of messages.


def join_oasst_messages(
    rows: Iterable[tuple[str, dict[str, Any]]],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Passes rows on, and joins OASST's single messages to trees, each at the place of its root.

    Raises DataError if a message's parent is missing.
    """
    known: dict[str, dict[str, Any]] = {}
    messages: list[tuple[str, dict[str, Any]]] = []
    # A reply may come before its parent in the file: collect all messages, then link them.
    for where, row in rows:
        if not {"message_id", "text", "role", "message_tree_id"} <= row.keys():
            yield where, row
            continue
        message = row | {"replies": []}
        expect("message_id", row["message_id"], "a text", lambda v: isinstance(v, str))
        known[row["message_id"]] = message
        messages.append((where, message))
    for where, message in messages:
        parent = message.get("parent_id")
        if parent is not None and parent not in known:
            raise DataError(f'{where}: field "parent_id" names a message that is not in the file')
        if parent is not None:
            known[parent]["replies"].append(message)
    for where, message in messages:
        if message.get("parent_id") is None:
            yield where, {"message_tree_id": message["message_tree_id"], "prompt": message}


def _oasst(row: Row, what: str) -> Rows:
    """Conversations: every path from root to leaf. Other examples: each message with replies."""
    paths = list(_paths(row.get("prompt"), row))
    if what == "conversation":
        yield from _conversations(paths)
        return
    found = False
    for path, replies in paths:
        if path[-1]["role"] != "user" or not replies:
            continue
        ranked = [r for r in replies if r.get("rank") is not None]
        if len(ranked) < len(replies):
            row.unused_nested["prompt.replies without a rank"] = None
        texts = [r["text"] for r in ranked]
        if what == "prompt":
            yield {"prompt": list(path)}
        elif len(ranked) > 1:
            yield {"prompt": list(path), "responses": texts, "rank": [r["rank"] for r in ranked]}
        else:
            continue
        found = True
    if not found:
        raise UnusableRow("no message has two ranked replies")


_Path = tuple[tuple[dict[str, Any], ...], list[dict[str, Any]]]


def _paths(root: Any, row: Row) -> Iterator[_Path]:
    """(the turns up to and with a message, its replies) of each message that was not deleted."""
    # A stack in place of recursion: a thread may be deeper than Python's recursion limit.
    stack: list[tuple[Any, tuple[dict[str, Any], ...]]] = [(root, ())]
    while stack:
        node, before = stack.pop()
        expect("prompt", node, "a message with text, role and replies", _is_node)
        row.note_unused("prompt", node, ("text", "role", "replies", "rank", "deleted"))
        if node.get("deleted"):
            continue
        role = "user" if node["role"] == "prompter" else "assistant"
        path = (*before, {"role": role, "content": node["text"]})
        replies = [r for r in node.get("replies") or () if not r.get("deleted")]
        yield path, replies
        stack += [(reply, path) for reply in reversed(replies)]


def _is_node(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("replies", []), list | None):
        return False
    return all(
        isinstance(message, dict)
        and isinstance(message.get("text"), str)
        and message.get("role") in ("prompter", "assistant")
        and (message.get("rank") is None or is_number(message["rank"]))
        for message in (value, *(value.get("replies") or ()))
    )


def _conversations(paths: list[_Path]) -> Rows:
    # Paths share their first turns: weight 0 keeps the loss of a shared turn to its first path.
    seen: set[int] = set()
    for path, replies in paths:
        if replies:
            continue
        turns = [turn | {"weight": 0} if id(turn) in seen else turn for turn in path]
        seen |= {id(turn) for turn in path if turn["role"] == "assistant"}
        yield {"messages": turns}


# Annotation tools.


def _argilla(row: Row, what: str) -> Rows:
    """The fields, joined with the answers of one annotator at a time."""
    fields, annotators = row.get("fields"), _argilla_answers(row.get("responses"), row)
    if not annotators and what in ("conversation", "prompt", "set of answers"):
        annotators = [{}]  # these need no judgement: the fields may hold all of it
    if not annotators:
        raise UnusableRow("no submitted response")
    for answers in annotators:
        _refuse_collision(fields, answers)
        yield fields | answers


def _argilla_answers(answers: Any, row: Row) -> list[dict[str, Any]]:
    """question -> answer, for each annotator."""
    if isinstance(answers, list):  # Argilla 1: a list of responses, each with its values
        return [
            {question: value.get("value") for question, value in response["values"].items()}
            for response in answers
            if isinstance(response, dict)
            and response.get("status", "submitted") == "submitted"
            and isinstance(response.get("values"), dict)
        ]
    users: dict[str, dict[str, Any]] = {}
    expect("responses", answers, "responses by question", lambda v: isinstance(v, dict))
    for question, given in answers.items():
        expect(f"responses.{question}", given, "a list of responses", lambda v: isinstance(v, list))
        for i, response in enumerate(given):
            expect(
                f"responses.{question}[{i}]", response, "an object", lambda v: isinstance(v, dict)
            )
            row.note_unused("responses[]", response, ("value", "status"))
            if response.get("status", "submitted") == "submitted":
                user = users.setdefault(repr(response.get("user_id", i)), {})
                user[question] = response.get("value")
    return list(users.values())


def _label_studio(row: Row, what: str) -> Rows:
    """The task's data, joined with the results of one annotation at a time."""
    data, annotations = row.get("data"), row.get("annotations")
    used = [a for a in annotations if isinstance(a, dict) and not a.get("was_cancelled")]
    if not used:
        raise UnusableRow("no annotation")
    for annotation in used:
        results = annotation.get("result")
        row.note_unused("annotations[]", annotation, ("result", "was_cancelled"))
        expect("annotations[].result", results, "a list of results", lambda v: isinstance(v, list))
        assert isinstance(results, list)
        values = dict(data)
        for result in results:
            _add_label_studio_result(result, values, row)
        yield values


def _add_label_studio_result(result: Any, values: dict[str, Any], row: Row) -> None:
    """Adds the fields of one result to the task's data."""
    if not (isinstance(result, dict) and isinstance(result.get("value"), dict)):
        raise DataError('field "annotations[].result[]" must be an object with a value')
    kind, value, name = result.get("type"), result["value"], str(result.get("from_name"))
    row.note_unused("annotations[].result[]", result, ("type", "value", "to_name"))
    row.note_unused("annotations[].result[].value", value, ("rating", "selected", "text", "number"))
    if kind == "rating":
        given: dict[str, Any] = {"rating": value.get("rating")}
    elif kind == "pairwise":
        sides = str(result.get("to_name")).split(",")
        if value.get("selected") not in ("left", "right") or len(sides) != 2:
            raise UnusableRow("no side is selected")
        if not set(sides) <= values.keys():
            raise DataError(f'field "to_name" names {", ".join(sides)}, which "data" has not')
        left_won = value["selected"] == "left"
        chosen, rejected = (values.pop(side) for side in (sides if left_won else sides[::-1]))
        given = {"chosen": chosen, "rejected": rejected}
    elif kind == "textarea":
        text = value.get("text")
        given = {name: "\n".join(text) if isinstance(text, list) else text}
    elif kind == "number":
        given = {name: value.get("number")}
    else:
        raise UnusableRow(f"a result of type {kind!r:.40}, which no verb reads")
    _refuse_collision(values, given)
    values |= given


def _refuse_collision(fields: dict[str, Any], answers: dict[str, Any]) -> None:
    if both := sorted(fields.keys() & answers.keys()):
        raise DataError(f'"{both[0]}" is a field and a question; rename one of them')


def _format(
    name: str, fields: str, translate: Callable[[Row, str], Rows], /, **nested: type
) -> PublicFormat:
    return PublicFormat(name, frozenset(fields.split()), translate, nested)


_HELPSTEER2 = "prompt response_1 response_2 preference_strength"
_KAGGLE = "prompt response_a response_b winner_model_a winner_model_b"
# The first match counts.
_FORMATS = (
    _format("UltraFeedback", "instruction completions", _ultrafeedback, completions=list),
    _format("SHP", "history human_ref_A human_ref_B labels", _shp),
    _format("HelpSteer2 preferences", _HELPSTEER2, _helpsteer_pair),
    _format("HelpSteer3", "context response1 response2 overall_preference", _helpsteer3),
    _format("HelpSteer", f"prompt response {' '.join(AXES[:3])}", _helpsteer),
    _format("LMSYS arena", "conversation_a conversation_b winner", _arena),
    _format("LMSYS arena (Kaggle)", _KAGGLE, _arena_kaggle),
    _format(
        "OpenAI preferences",
        "input preferred_output non_preferred_output",
        _openai_pair,
        input=dict,
    ),
    _format("OASST trees", "message_tree_id prompt", _oasst, prompt=dict),
    _format("an Argilla record", "fields responses", _argilla, fields=dict),
    _format("a Label Studio task", "data annotations", _label_studio, data=dict, annotations=list),
)
