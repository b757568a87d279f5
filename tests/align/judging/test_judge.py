"""Judges: the engine's verdicts against the model's logits, position bias, the endpoint."""

import json
import math
import threading
from dataclasses import replace

import pytest
import torch
from command_line import TINY
from judge_server import Reply, fails, judging, says
from servers import serving

from openpalm.align.judging import model_judge as judge_module
from openpalm.align.judging.endpoint_judge import MAX_REPLY_BYTES, TRIES, EndpointJudge
from openpalm.align.judging.model_judge import (
    Comparison,
    EngineJudge,
    Question,
    Refused,
    Unlikely,
    combine_verdicts,
    comparison_questions,
    judgement_id,
    revision,
    rule_questions,
    rule_reward,
)
from openpalm.align.judging.reward_sources import RewardContext, RewardPrompt, load_reward
from openpalm.align.rollouts.rollout_batch import Completion
from openpalm.checkpoint import directory as checkpoint
from openpalm.data.rows.constitution import Article, Constitution
from openpalm.data.text.conversation import Message, render
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import SettingsError, WorkError
from openpalm.generate.engine import Engine
from openpalm.model.transformer import Transformer, initialise

PROMPT = (Message("user", "Which is it?"),)
ONE = Constitution((Article("The better answer.", 1.0),))
TWO = Constitution((Article("The kinder.", 1.0), Article("The shorter.", 3.0)))


def outraged(check, *given):
    with pytest.raises(AssertionError):
        check(*given)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A checkpoint that replies A, B, yes or no, depending on the text."""
    folder = tmp_path_factory.mktemp("judge")
    config = replace(
        TINY, context=1024, kv_heads=4, tied=False, bias=True, feedforward="gelu", rotary_dims=4
    )
    model, tokenizer = Transformer(config), Tokenizer.byte()
    initialise(model, seed=0)
    with torch.no_grad():
        model.embedding *= 20
        model.unembedding *= 4
        for letter in "AByesno":
            model.head_bias[tokenizer.encode(letter)] = 40
    tokenizer.save(folder / "tokenizer.json")
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    checkpoint.save(folder / "judge", model, tokenizer_json=text)
    return folder / "judge"


@pytest.fixture(scope="module")
def judge(directory):
    return EngineJudge(Engine(checkpoint.load(directory)), Tokenizer.byte(), "ours")


@torch.no_grad()
def log_prob(model, tokenizer, text, reply):
    ids = render(tokenizer, [Message("user", text)], add_generation_prompt=True).ids
    total = 0.0
    for token in tokenizer.encode(reply):
        total += model.logits(torch.tensor([ids]))[0, -1].log_softmax(-1)[token].item()
        ids = [*ids, token]
    return total


def check_by_logits(first, judge):
    questions = [
        Question("Is this it?", ("A", "B")),
        Question("Or is this?", ("A", "B")),
        Question("Well?", ("yes", "no")),
    ]
    model = judge.engine.model
    for question, found in zip(questions, first(questions), strict=True):
        a, b = (log_prob(model, judge.tokenizer, question.text, x) for x in question.labels)
        chance, mass = found
        assert chance == pytest.approx(1 / (1 + math.exp(b - a)), abs=1e-4)
        assert mass == pytest.approx(math.exp(a) + math.exp(b), rel=1e-3, abs=1e-6)


def test_the_engines_judgement_is_the_models(judge):
    check_by_logits(judge.label_probabilities, judge)

    def without_the_template(questions):
        texts = [(judge.tokenizer.encode(q.text), q.labels) for q in questions]
        scored = [
            judge.engine.score([ids + judge.tokenizer.encode(label) for label in labels])
            for ids, labels in texts
        ]
        sums = [
            [row[len(ids) - 1 :].sum() for row in pair]
            for (ids, _), pair in zip(texts, scored, strict=True)
        ]
        both = [torch.stack(pair) for pair in sums]
        return [(pair.softmax(-1)[0].item(), pair.exp().sum().item()) for pair in both]

    outraged(check_by_logits, without_the_template, judge)
    outraged(
        check_by_logits, lambda qs: [(1 - p, m) for p, m in judge.label_probabilities(qs)], judge
    )


def test_labels_that_are_unlikely_together_are_no_verdict(judge, monkeypatch):
    """The judge would reply something else: a ratio of two small numbers is no verdict."""
    questions = [Question("Is this it?", ("A", "B")), Question("Is this it?", ("x", "z"))]
    (chance, mass), (_, little) = judge.label_probabilities(questions)
    assert little < 0.01 < mass
    monkeypatch.setattr(judge_module, "MIN_LABEL_MASS", mass)
    found, unlikely = judge.verdicts(questions)
    assert found == chance
    assert unlikely == Unlikely(little)
    monkeypatch.setattr(judge_module, "MIN_LABEL_MASS", mass * 1.01)
    assert isinstance(judge.verdicts(questions)[0], Unlikely)


def logistic(x):
    return 1 / (1 + math.exp(-x))


def biased(quality, bias):
    """Verdicts of a judge with log-odds of quality difference plus a bias for A."""

    def chances(a, b):
        return [logistic(quality[a] - quality[b] + bias), logistic(quality[b] - quality[a] + bias)]

    return chances


def check_bias_cancels(combine):
    quality = {"good": 1.5, "bad": 0.0}
    for bias in (-1.0, 0.0, 1.0):
        chances = biased(quality, bias)
        assert combine(chances("good", "bad"), ONE).payload.get("better") == 0
        assert combine(chances("bad", "good"), ONE).payload.get("better") == 1
    for bias in (-2.0, 2.0):  # stronger than the difference: the orders disagree
        assert combine(biased(quality, bias)("good", "bad"), ONE).payload == {"tie": [0, 1]}


def test_a_liking_for_a_place_cancels():
    check_bias_cancels(combine_verdicts)
    outraged(check_bias_cancels, lambda chances, _: Comparison(chances[0], chances[0]))
    outraged(check_bias_cancels, lambda chances, _: Comparison(chances[0], chances[1]))


def test_principles_count_by_their_weights():
    chances = [0.9, 0.2, 0.3, 0.8]  # kinder: the first; shorter, three times as much: the second
    found = combine_verdicts(chances, TWO)
    assert found.first == pytest.approx((0.9 + 3 * 0.3) / 4)
    assert found.swapped == pytest.approx((0.8 + 3 * 0.2) / 4)
    assert found.payload["better"] == 1


@pytest.mark.parametrize(
    ("p", "strength"), [(0.51, 1), (0.66, 1), (0.67, 2), (0.83, 2), (0.84, 3), (1.0, 3)]
)
def test_strength_is_the_third_that_the_mean_lies_in(p, strength):
    assert Comparison(p, p).payload == {"better": 0, "worse": 1, "strength": strength}
    assert Comparison(1 - p, 1 - p).payload == {"better": 1, "worse": 0, "strength": strength}


def test_questions_come_in_both_orders():
    questions = comparison_questions(PROMPT, "first answer", "second answer", TWO)
    assert len(questions) == 4
    for number, question in enumerate(questions):
        order = [question.text.index(text) for text in ("first answer", "second answer")]
        assert (order[0] < order[1]) == (number % 2 == 0)
        assert TWO.articles[number // 2].text in question.text
        assert "Which is it?" in question.text


def test_ids_tell_judgements_apart():
    known = judgement_id("compare", "ours", "v1", PROMPT, "a", "b")
    assert known == judgement_id("compare", "ours", "v1", PROMPT, "a", "b")
    others = {
        judgement_id("edit", "ours", "v1", PROMPT, "a", "b"),
        judgement_id("compare", "theirs", "v1", PROMPT, "a", "b"),
        judgement_id("compare", "ours", "v2", PROMPT, "a", "b"),
        judgement_id("compare", "ours", "v1", PROMPT, "b", "a"),
        judgement_id("compare", "ours", "v1", (Message("system", "Which is it?"),), "a", "b"),
    }
    assert len(others | {known}) == 6


def check_rules(reward, judge):
    rules = Constitution((Article("No shouting.", 1.0), Article("No lies.", 2.0)))
    model, total = judge.engine.model, 0.0
    for question, weight in zip(rule_questions(PROMPT, "LOUD", rules), (1, 2), strict=True):
        yes, no = (log_prob(model, judge.tokenizer, question.text, x) for x in ("yes", "no"))
        total -= weight / 3 * logistic(yes - no)
    assert -0.99 < total < -0.01
    assert reward("LOUD", rules) == pytest.approx(total, abs=1e-4)


def test_rules_are_rewards(directory, judge, tmp_path):
    file = tmp_path / "rules.yaml"
    file.write_text("rules:\n  - No shouting.\n  - {text: No lies., weight: 2}\n")
    tokenizer = Tokenizer.byte()
    reader = RewardContext(tokenizer, [RewardPrompt("Which is it?", {})], frozenset())
    source = load_reward([f"rules:{file}@{directory}"], reader)

    def reward(text, _):
        answer = Completion(0, [1], tokenizer.encode(text), [], ended=True)
        return source([Completion(0, [1], [1], [], ended=True), answer])[1]

    check_rules(reward, judge)
    outraged(check_rules, lambda text, rules: -reward(text, rules), judge)
    outraged(check_rules, lambda text, rules: rule_reward([0.5, 0.5], rules) * 0.1, judge)
    with pytest.raises(WorkError, match="longer than the checkpoint's context"):
        reward("x" * 2000, None)


def test_a_bad_rules_source_is_named(directory, tmp_path):
    reader = RewardContext(Tokenizer.byte(), [], frozenset())
    for word in ("rules:", "rules:file.yaml", f"rules:@{directory}"):
        with pytest.raises(SettingsError, match=r"must be rules:FILE.yaml@CHECKPOINT"):
            load_reward([word], reader)


def test_what_is_too_long_is_not_asked(judge):
    assert judge.fits("x" * 900, 4)
    assert not judge.fits("x" * 1024, 4)
    article = ONE.articles[0]
    assert revision(judge, PROMPT, "x" * 1024, article, 8) is None


# --- the endpoint


def asked(seen, questions, **how):
    waits = []

    async def wait(seconds):
        waits.append(seconds)

    judge = EndpointJudge(seen.url, "theirs", wait=wait, **how)
    return judge.verdicts(questions), judge, waits


Q = Question("Which?", ("A", "B"))


def test_log_probabilities_of_the_labels_are_weighed():
    top = {"A": math.log(0.2), " A": math.log(0.1), "B": math.log(0.1), "An": math.log(0.5)}
    with judging(lambda *_: says("An", top)) as seen:
        found, _, _ = asked(seen, [Q], key="secret")
    assert found == [pytest.approx(0.75)]
    assert seen.headers[0]["authorization"] == "Bearer secret"
    assert seen.requests[0]["path"] == "/v1/chat/completions"
    assert (seen.requests[0]["model"], seen.requests[0]["temperature"]) == ("theirs", 0)


@pytest.mark.parametrize(
    ("content", "chance"),
    [("A", 1.0), ("(B)", 0.0), (" b.", 0.0), ("Answer: B", 0.0), ("Neither", None), ("", None)],
)
def test_without_log_probabilities_the_reply_counts(content, chance):
    with judging(lambda *_: says(content)) as seen:
        found, _, _ = asked(seen, [Q])
    assert found == [chance]
    assert "authorization" not in seen.headers[0]


def test_answers_keep_the_order_of_their_questions():
    with judging(lambda text, _: says(text[-1])) as seen:
        found, _, _ = asked(seen, [Question(f"say {x}", ("A", "B")) for x in "ABBABA" * 4])
    assert found == [1.0, 0.0, 0.0, 1.0, 0.0, 1.0] * 4


def test_what_may_pass_is_tried_again():
    with judging(lambda _, n: [fails(429), fails(503), says("A")][n]) as seen:
        found, _, waits = asked(seen, [Q])
    assert found == [1.0]
    assert len(waits) == 2
    assert 0.5 <= waits[0] <= 1 <= waits[1] <= 2


def test_what_does_not_pass_ends():
    with (
        judging(lambda *_: fails(500, "out of order")) as seen,
        pytest.raises(WorkError, match=r"status 500 \('out of order'\)"),
    ):
        asked(seen, [Q])
    assert len(seen.requests) == TRIES


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (fails(401, "who are you?\x1b[2J"), r"status 401 \('who are you\?\\x1b\[2J'\)"),
        (fails(302, "there", Location="http://127.0.0.1:9/"), "status 302"),
        (Reply(b"<html>"), "no JSON object"),
        (Reply(b"[" * 100_000), "no JSON object"),
        (Reply(b"{}"), "no choices"),
        (Reply(b'{"choices": [3]}'), "no choices"),
        (Reply(b" " * (MAX_REPLY_BYTES + 1)), "larger than"),
    ],
)
def test_what_cannot_be_used_is_one_clear_error(reply, says):
    with judging(lambda *_: reply) as seen, pytest.raises(WorkError, match=says):
        asked(seen, [Q])
    assert len(seen.requests) == 1


@pytest.mark.parametrize(
    "body",
    [
        b'{"choices": [{}]}',
        b'{"choices": [{"message": 3, "logprobs": {"content": [{"top_logprobs": 3}]}}]}',
        b'{"choices": [{"logprobs": {"content": '
        b'[{"top_logprobs": [{"token": "A", "logprob": NaN}]}]}}]}',
    ],
)
def test_odd_replies_decide_nothing(body):
    with judging(lambda *_: Reply(body)) as seen:
        found, _, _ = asked(seen, [Q])
    assert found == [None]


def test_nobody_there_and_nobody_in_time():
    with judging(lambda *_: says("A")) as seen:
        pass
    with pytest.raises(WorkError, match="connection attempts failed"):
        asked(seen, [Q])
    over = threading.Event()

    def slow(*_):
        over.wait()
        return says("A")

    with judging(slow) as seen:
        try:
            with pytest.raises(WorkError, match="timed out"):
                asked(seen, [Q], timeout_s=0.05)
        finally:
            over.set()


@pytest.mark.parametrize("url", ["file:///etc/passwd", "127.0.0.1:8000", "http://", "http://[", ""])
def test_other_addresses_are_refused(url):
    with pytest.raises(SettingsError, match="must be an http"):
        EndpointJudge(url, "theirs")


def test_a_key_no_header_may_hold_is_refused_unshown():
    with pytest.raises(SettingsError) as error:
        EndpointJudge("http://127.0.0.1/v1", "theirs", "top\nsecret")
    assert "secret" not in str(error.value)


def test_ours_is_the_same_judge_over_http(directory, judge):
    questions = comparison_questions(PROMPT, "It is this.", "It is that.", TWO)
    with serving(directory, "--dtype", "float32") as server:
        model = server.call("/v1/models").body["data"][0]["id"]
        theirs = EndpointJudge(f"{server.url}/v1", model)
        there = theirs.verdicts(questions)
        texts = theirs.write([questions[0].text], 6)
    here = judge.verdicts(questions)
    assert there == pytest.approx(here, abs=1e-4)
    assert max(here) - min(here) > 1e-3
    assert texts == judge.write([questions[0].text], 6)


# --- what endpoints refuse


def body_refusing(refuses, *names):
    """An endpoint that answers 400 to a request with one of the options."""

    def reply(_, n):
        sent = seen_of["it"].requests[n]
        for name in names:
            if refuses(sent, name):
                return fails(400, f"Unsupported parameter: '{name}'")
        return says("B")

    seen_of = {}
    return reply, seen_of


@pytest.mark.parametrize(
    "names", [["logprobs"], ["max_tokens"], ["temperature"], ["logprobs", "temperature"]]
)
def test_a_refused_option_is_left_out_once_for_all(names):
    reply, seen_of = body_refusing(lambda sent, name: name in sent, *names)
    with judging(reply) as seen:
        seen_of["it"] = seen
        found, _, waits = asked(seen, [Q] * 3, parallel=1)
    assert (found, waits) == ([0.0] * 3, [])
    assert len(seen.requests) == 3 + len(names)
    assert "max_tokens" not in names or "max_completion_tokens" in seen.requests[-1]


def test_fewer_log_probabilities_are_asked_for_where_twenty_are_too_many():
    reply, seen_of = body_refusing(lambda sent, name: sent.get(name, 0) > 5, "top_logprobs")
    with judging(reply) as seen:
        seen_of["it"] = seen
        assert asked(seen, [Q])[0] == [0.0]
    assert [sent["top_logprobs"] for sent in seen.requests] == [20, 5]


@pytest.mark.parametrize(
    "body", [{"error": {"message": "WHY"}}, {"error": "WHY"}, {"message": "WHY"}, {"detail": "WHY"}]
)
def test_a_refused_question_is_passed_over_with_its_reason(body):
    refusal = Reply(json.dumps(body).encode(), 400)
    with judging(lambda text, _: refusal if text == "long" else says("A")) as seen:
        found, _, _ = asked(seen, [Question("long", ("A", "B")), Q])
    assert found == [Refused("status 400 ('WHY')"), 1.0]


def test_the_endpoint_says_when_to_ask_again():
    replies = [fails(429, "slow", **{"Retry-After": "20"}), says("A")]
    with judging(lambda _, n: replies[n]) as seen:
        found, _, waits = asked(seen, [Q])
    assert (found, waits) == ([1.0], [20.0])


def test_labels_with_little_mass_decide_nothing():
    with judging(lambda *_: says("Well", {"A": math.log(0.01), "Well": math.log(0.9)})) as seen:
        assert asked(seen, [Q])[0] == [None]
