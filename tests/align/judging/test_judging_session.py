"""Judging sessions: each judgement once, exclusions counted, completions sampled on demand."""

from dataclasses import dataclass, field

import pytest
from tiny_models import tiny

from openpalm.align.judging import judging_session
from openpalm.align.judging.best_of_n import SamplingPlan
from openpalm.align.judging.judging_session import (
    JudgingSession,
    Writer,
    items_from_model,
    items_from_rows,
)
from openpalm.align.judging.model_judge import Refused
from openpalm.base.jsonl import open_jsonl
from openpalm.data.rows.constitution import Article, Constitution
from openpalm.data.rows.preferences import Candidate, Preference
from openpalm.data.rows.readers.candidates import CandidateRow
from openpalm.data.rows.readers.prompts import PromptRow
from openpalm.data.text.conversation import Message, render, stop_ids
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import WorkError
from openpalm.generate.engine import Engine

ARTICLES = Constitution((Article("More stars.", 1.0), Article("Many.", 2.0)))


@dataclass
class Stars:
    """Prefers the completion with more stars; refuses long texts; may write nothing."""

    name: str = "stars"
    asked: list[str] = field(default_factory=list)

    def fits(self, text, reply_tokens):
        return "long" not in text

    def verdicts(self, questions):
        self.asked += [text for text, _ in questions]
        return [0.9 if stars(text, "A") > stars(text, "B") else 0.1 for text, _ in questions]

    def write(self, texts, max_new_tokens):
        self.asked += texts
        return ["" if "silence" in text else " **** " for text in texts]


def stars(text, label):
    return text.split(f"Answer {label}:\n")[1].split("\n")[0].count("*")


def asks(text):
    return (Message("user", text),)


def item(*answers, prompt="Which?"):
    [made] = items_from_rows([CandidateRow(asks(prompt), tuple(Candidate(a) for a in answers))])
    return made


def fails(check, *given):
    with pytest.raises(AssertionError):
        check(*given)


def run_session(path, session, work, items):
    """The session's summary, the judge's questions, and all records of the file."""
    judge = Stars()
    with open_jsonl(path) as file:
        known = [row["id"] for row in file.found]
        working = session(judge, ARTICLES, 16, file, known)
        for each in items:
            getattr(working, work)(each)
    with open_jsonl(path) as file:
        records = [Preference.from_json(row, "row") for row in file.found]
    return working.summary(), judge.asked, records


def check_every_two_once(path, session):
    items = [item("*", "***", "**"), item("", "*", "long")]
    told, asked, records = run_session(path, session, "compare", items)
    assert (told["written"], told["known"], len(asked)) == (3, 0, 3 * 2 * 2)
    assert told["left_out"] == {"empty completion": 2, "longer than the judge's context": 1}
    assert told["first_place"] == pytest.approx(0.5)
    for record in records:
        better, worse = (record.candidates[record.payload[key]] for key in ("better", "worse"))
        assert len(better.text) > len(worse.text)
    told, asked, again = run_session(path, session, "compare", items)
    assert (told["written"], told["known"], asked, again) == (0, 3, [], records)


def test_every_two_answers_are_compared_once(tmp_path):
    check_every_two_once(tmp_path / "j.jsonl", JudgingSession)

    class Forgetful(JudgingSession):
        def __init__(self, judge, constitution, max_new_tokens, file, known):
            super().__init__(judge, constitution, max_new_tokens, file)

    class Careless(JudgingSession):
        def _pending(self, item, kind, places):
            return super()._pending(item, kind, places[1:])

    for number, bug in enumerate((Forgetful, Careless)):
        fails(check_every_two_once, tmp_path / f"{number}.jsonl", bug)


def test_equal_answers_say_nothing(tmp_path):
    told, asked, _ = run_session(
        tmp_path / "j.jsonl", JudgingSession, "compare", [item("*", " * ")]
    )
    assert (told["written"], told["left_out"], asked) == (0, {"equal completions": 1}, [])
    assert told["first_place"] is None


def test_the_first_answer_is_revised_once(tmp_path):
    items = [item("*", "**"), item("silence"), item("long"), item("*", prompt="Other?")]
    told, _, records = run_session(tmp_path / "j.jsonl", JudgingSession, "revise", items)
    assert told["left_out"] == {"no reply": 1, "longer than the judge's context": 1}
    assert [r.payload for r in records] == [{"candidate": 0, "text": "****"}] * 2
    assert [r.candidates[0].text for r in records] == ["*", "*"]
    again = run_session(tmp_path / "j.jsonl", JudgingSession, "revise", items[:1])
    assert (again[0]["known"], again[1]) == (1, [])


def test_edits_and_comparisons_are_other_judgements(tmp_path):
    items = [item("*", "**")]
    run_session(tmp_path / "j.jsonl", JudgingSession, "revise", items)
    assert run_session(tmp_path / "j.jsonl", JudgingSession, "compare", items)[0]["written"] == 1


# --- answers of a model


@pytest.fixture(scope="module")
def writer():
    return Writer(Engine(tiny()), Tokenizer.byte(), "c" * 64, SamplingPlan(2, 6, 1.0, 3))


PROMPTS = [asks(f"{i}?") for i in range(judging_session.PROMPTS_PER_BATCH + 3)]


def check_drawn(writer, draw_items):
    """Each prompt has the completions that are sampled for it alone, with their numbers."""
    ids = [render(writer.tokenizer, prompt, add_generation_prompt=True).ids for prompt in PROMPTS]
    stops = stop_ids(writer.tokenizer)
    for n, made in enumerate(draw_items(writer, [PromptRow(p, {}) for p in PROMPTS], ids)):
        alone = writer.plan.sample(writer.engine, ids, [n], stops)
        texts = [writer.tokenizer.decode([i for i in a.ids if i not in stops]) for a in alone]
        assert [c.text for c in made.candidates()] == texts
        assert [c.sampling["draw"] for c in made.candidates()] == [2 * n, 2 * n + 1]
        assert [origin[2] for origin in made.origins] == [2 * n, 2 * n + 1]
        assert made.prompt == PROMPTS[n]


def test_answers_are_drawn_in_blocks_as_alone(writer):
    check_drawn(writer, items_from_model)

    def one_off(writer, rows, ids):
        made = items_from_model(writer, rows, ids)
        return [
            each._replace(candidates=other.candidates)
            for each, other in zip(made, [*made[1:], made[0]], strict=True)
        ]

    fails(check_drawn, writer, one_off)


def test_nothing_is_drawn_before_it_is_wanted(writer):
    class Idle:
        def __getattr__(self, name):
            raise AssertionError(f"asked for {name}")

    made = items_from_model(writer._replace(engine=Idle()), [PromptRow(PROMPTS[0], {})], [[1]])
    assert made[0].origins[1] == ["c" * 64, writer.sampling, 1]
    fails(made[0].candidates)


def test_undecided_and_refused_items_have_no_record_and_are_asked_again(tmp_path):
    class Picky(Stars):
        def verdicts(self, questions):
            if "odd" in questions[0].text:
                return [0.9, None, 0.9, 0.9]
            refused = "huge" in questions[0].text
            return [Refused("too long")] * 4 if refused else super().verdicts(questions)

    items = [item("*", "odd"), item("*", "huge"), item("*", "**")]
    for written, known in ((1, 0), (0, 1)):
        with open_jsonl(tmp_path / "j.jsonl") as file:
            session = JudgingSession(Picky(), ARTICLES, 16, file, [row["id"] for row in file.found])
            for each in items:
                session.compare(each)
        told = session.summary()
        assert (told["written"], told["known"], told["ties"]) == (written, known, 0)
        assert told["left_out"] == {"undecided": 1, "refused by the judge": 1}
        assert [refused["reason"] for refused in told["refused"]] == ["too long"]


def test_a_judge_that_refuses_all_is_an_error(tmp_path):
    class Closed(Stars):
        def verdicts(self, questions):
            return [Refused("no credit")] * len(questions)

    with open_jsonl(tmp_path / "j.jsonl") as file:
        session = JudgingSession(Closed(), ARTICLES, 16, file)
        for _ in range(judging_session.MAX_FIRST_REFUSALS - 1):
            session.compare(item("*", "**"))
        with pytest.raises(WorkError, match="no credit"):
            session.compare(item("*", "**"))
