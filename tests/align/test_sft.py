"""Supervised fine-tuning: which tokens carry the loss, and a question that is memorised."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from command_line import TINY, ok, rows, talk, write_base

from openpalm.align.sft import to_example
from openpalm.data.batches.loader import IGNORE, Batch, example_loader, packed, padded
from openpalm.data.text.conversation import Message
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import DataError
from openpalm.model.cross_entropy import linear_cross_entropy
from openpalm.model.transformer import Transformer, initialise
from openpalm.train.objective import NextToken

# A turn a line: what stands before it is read, what is said in capitals is learnt.
MULTI_TURN = [
    ("system", "be kind"),
    ("user", "hi"),
    ("assistant", "YO"),
    ("user", "and you?"),
    ("assistant", "WELL, é"),
]


def messages(turns):
    return tuple(Message(role, text) for role, text in turns)


def records(tokenizer, conversations, template="chat"):
    return [to_example(tokenizer, messages, template) for messages in conversations]


@pytest.fixture(scope="module")
def byte():
    return Tokenizer.byte()


@pytest.fixture(scope="module")
def model():
    model = Transformer(TINY)
    initialise(model, seed=0)
    return model.eval()


def by_hand(tokenizer, turns):
    """Ids and loss mask, written out from the definition of the format."""
    ids, learnt = [], []
    for role, text in turns:
        said = [*text.encode(), tokenizer.special_id("<|end|>")]
        ids += [tokenizer.special_id(f"<|{role}|>"), *said]
        learnt += [False] + [role == "assistant"] * len(said)
    return ids, learnt


def loss_and_gradient(model, batch):
    """The objective's loss and its gradient with respect to the logits, [rows, time, vocab]."""
    logits = model.logits(batch.inputs).detach().requires_grad_()

    class Fixed:
        """Its states are the logits already: the head is the identity."""

        def residual(self, ids, *, layout, selected):
            assert torch.equal(ids, batch.inputs)
            assert layout is None
            return logits if selected is None else logits.flatten(0, 1)[selected]

        def cross_entropy(self, states, targets, *, z_loss, chunk):
            head = torch.eye(states.shape[-1])
            return linear_cross_entropy(states, head, None, targets, z_loss=z_loss, chunk=chunk)

    loss, _ = NextToken().loss(Fixed(), batch)
    loss.backward()
    return loss.item(), logits.grad


@pytest.mark.parametrize("turns", [MULTI_TURN, MULTI_TURN[1:3], MULTI_TURN[2:3]])
def test_only_the_assistant_and_its_end_markers_carry_gradient(byte, model, turns):
    ids, learnt = by_hand(byte, turns)
    (record,) = records(byte, [messages(turns)])
    assert (record.ids, record.loss_mask) == (ids, learnt)
    batch = next(example_loader([record], rows=1, seed=0, sequence_length=48))
    loss, gradient = loss_and_gradient(model, batch)
    carries = (gradient[0] != 0).any(dim=-1).tolist()
    width = batch.inputs.shape[1]
    expected = learnt[1:] + [False] * (width - len(ids) + 1)
    assert carries == expected

    log_probs = model.logits(torch.tensor([ids]))[0].log_softmax(dim=-1)
    said = [-log_probs[t - 1, ids[t]].item() for t in range(1, len(ids)) if learnt[t]]
    assert loss == pytest.approx(sum(said), rel=1e-4)
    assert NextToken().count(batch) == len(said)


def test_what_the_user_said_is_never_a_target(byte, model):
    """The loss is on the assistant's tokens, with any user turn."""
    batches = [
        next(
            example_loader(
                records(byte, [messages([("user", asked), ("assistant", "YES")])]),
                rows=1,
                seed=0,
                sequence_length=48,
            )
        )
        for asked in ("abcd", "wxyz")
    ]
    assert not torch.equal(batches[0].inputs, batches[1].inputs)
    assert torch.equal(batches[0].targets, batches[1].targets)
    wanted = batches[0].targets[batches[0].targets != IGNORE].tolist()
    assert wanted == [*b"YES", byte.special_id("<|end|>")]


def test_a_row_of_a_batch_counts_as_alone(byte, model):
    """The loss of a batch is the sum over its rows: padding and other rows change nothing."""
    several = records(byte, [messages(MULTI_TURN), messages(MULTI_TURN[1:3])])
    together = next(example_loader(several, rows=2, seed=0, sequence_length=48))
    total, _ = loss_and_gradient(model, together)
    alone = 0.0
    for record in several:
        ids = torch.tensor(record.ids)
        targets = ids[1:].where(torch.tensor(record.loss_mask[1:]), IGNORE)
        alone += loss_and_gradient(model, Batch(ids[None, :-1], targets[None]))[0]
    assert total == pytest.approx(alone, rel=1e-5)


def test_a_vocabulary_without_markers_uses_words(model):
    """Plain text marks the turns there, and the loss is still on the answer alone."""
    content = json.loads(Tokenizer.byte()._canonical)
    content["added_tokens"] = [t for t in content["added_tokens"] if "endoftext" in t["content"]]
    plain = Tokenizer(json.dumps(content).encode(), "plain")
    (record,) = records(plain, [messages([("user", "hi"), ("assistant", "YO")])])
    learnt = [i for i, carries in zip(record.ids, record.loss_mask, strict=True) if carries]
    assert learnt == [*b"YO", plain.end_of_text]
    assert bytes(record.ids[:-1]) == b"User: hi\n\nAssistant: YO"


def test_a_conversation_without_assistant_beside_others_is_only_read(byte):
    found = records(byte, [messages([("user", "hi")]), messages(MULTI_TURN)])
    assert not any(found[0].loss_mask)
    assert any(found[1].loss_mask)


def test_gradient_of_the_loss_is_softmax_minus_target(byte, model):
    """The derivative of cross entropy at an assistant token."""
    (record,) = records(byte, [messages(MULTI_TURN[1:3])])
    batch = next(example_loader([record], rows=1, seed=0, sequence_length=48))
    _, gradient = loss_and_gradient(model, batch)
    at = record.loss_mask.index(True) - 1
    chances = model.logits(batch.inputs)[0, at].softmax(dim=-1)
    expected = chances - F.one_hot(torch.tensor(record.ids[at + 1]), 265)
    torch.testing.assert_close(gradient[0, at], expected, rtol=1e-4, atol=1e-6)


# --- packing


def check_packed_is_alone(objective, model, conversations):
    """Loss, count and gradients of rows that several share, against each in a row of its own."""

    def gradients(batches):
        model.zero_grad()
        total = 0.0
        for batch in batches:
            loss, _ = objective.loss(model, batch)
            loss.backward()
            total += loss.item()
        count = sum(objective.count(batch) for batch in batches)
        return total, count, [p.grad.clone() for p in model.parameters()]

    together = packed([conversations[:3], conversations[3:]], 96)
    alone = [Batch(*padded([record], 96)) for record in conversations]
    loss, count, found = gradients([together])
    expected, expected_count, wanted = gradients(alone)
    assert count == expected_count
    assert abs(loss - expected) < 1e-5 * expected
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() < 1e-5 * max(1, b.abs().max().item())


def test_packed_conversations_are_each_alone(byte):
    config = replace(TINY, context=96)
    model = Transformer(config)
    initialise(model, seed=0)
    talks = [MULTI_TURN, MULTI_TURN[1:3], MULTI_TURN[2:3], MULTI_TURN[3:], MULTI_TURN[:3]]
    conversations = records(byte, map(messages, talks))
    check_packed_is_alone(NextToken(), model, conversations)

    class CrossTalk(NextToken):
        def loss(self, model, batch):
            return super().loss(model, Batch(batch.inputs, batch.targets))

    class OffByOne(NextToken):
        def loss(self, model, batch):
            segments = None if batch.segments is None else batch.segments.roll(1, dims=1)
            return super().loss(model, Batch(batch.inputs, batch.targets, segments))

    for bug in (CrossTalk(), OffByOne()):
        with pytest.raises(AssertionError):
            check_packed_is_alone(bug, model, conversations)


# --- without a template


def test_without_a_template_a_prompt_goes_on_into_its_answer(byte):
    (record,) = records(byte, [messages([("user", "Hi "), ("assistant", "YO")])], "none")
    assert record.ids == [*b"Hi YO", byte.end_of_text]
    assert record.loss_mask == [False] * 3 + [True] * 3
    with pytest.raises(DataError, match="joins one prompt and one completion, not system, user"):
        records(byte, [messages(MULTI_TURN)], "none")


# --- through the command line

QUESTIONS = {"What is red?": "A colour.", "Who barks?": "The dog!"}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A model without pretraining, fine-tuned on two questions."""
    folder = tmp_path_factory.mktemp("sft")
    base = write_base(folder / "base")
    data = talk(
        folder / "questions.jsonl",
        *([("user", asked), ("assistant", answer)] for asked, answer in QUESTIONS.items()),
    )
    words = ["--init", base, "--data", data, "--out", folder / "chat", "--steps", 150]
    words += ["--batch-tokens", 96, "--dtype", "float32", "--optim.lr", 0.01]
    ok("sft", *words, "--save-every", 150)
    return folder


def test_the_loss_falls(tuned):
    losses = [row["loss"] for row in rows(tuned / "chat" / "metrics.jsonl")]
    assert len(losses) == 150
    assert losses[0] > 5
    assert sum(losses[-10:]) / 10 < 0.1


@pytest.mark.parametrize("asked", QUESTIONS)
def test_what_was_learnt_is_answered(said, tuned, asked):
    words = ["--chat", asked, "--temperature", 0]
    status, output, errors = said("sample", tuned / "chat", *words, "--json")
    assert (status, errors) == (0, [])
    answer = json.loads(output)
    assert answer["text"] == QUESTIONS[asked]
    assert answer["finish"] == "stop"
    assert said("sample", tuned / "chat", *words) == (0, f"{QUESTIONS[asked]}\n", [])
    assert said("sample", tuned / "chat", *words, "--stream")[1] == f"{QUESTIONS[asked]}\n"


def test_the_base_did_not_know(said, tuned):
    words = ["--chat", "Who barks?", "--temperature", 0, "--json"]
    assert json.loads(said("sample", tuned / "base", *words)[1])["text"] != "The dog!"


def test_a_finished_run_is_left_alone(said, tuned):
    before = (tuned / "chat" / "metrics.jsonl").read_bytes()
    words = ["--init", tuned / "base", "--data", tuned / "questions.jsonl", "--out"]
    words += [tuned / "chat", "--steps", 150, "--batch-tokens", 96, "--dtype", "float32"]
    status, output, _ = said("sft", *words, "--optim.lr", 0.01, "--save-every", 150)
    assert (status, "nothing to do" in output) == (0, True)
    assert (tuned / "chat" / "metrics.jsonl").read_bytes() == before


@pytest.fixture
def refused(said, tuned, tmp_path):
    """The one error line of `openpalm sft` over what is given."""

    def call(*turns, init=tuned / "base"):
        data = talk(tmp_path / "talk.jsonl", *turns)
        words = ["--data", data, "--out", tmp_path / "out", "--steps", 1, "--dtype", "float32"]
        words += ["--init", init] if init else ["--model", "palm-tiny"]
        status, _, errors = said("sft", *words)
        assert (status, len(errors)) == (2, 1)
        return errors[0]

    return call


def test_conversations_without_an_assistant(refused):
    assert "no conversation can be used: no assistant turn (1; line 1)" in refused([("user", "hi")])


def test_a_role_that_does_not_exist(refused):
    line = refused([("user", "hi"), ("robot", "yo")])
    assert "talk.jsonl:1" in line
    assert "robot" in line


def test_without_a_checkpoint(refused):
    assert "--init is missing: name the run or checkpoint" in refused(
        [("assistant", "yo")], init=None
    )


def test_held_out_conversations_without_an_answer_do_not_stop_the_run(said, tuned, tmp_path):
    turns = [[("user", "hi"), ("assistant", "yo")]] * 20 + [[("user", "hi")]] * 2
    data = talk(tmp_path / "talk.jsonl", *turns)
    words = ["--init", tuned / "base", "--data", data, "--out", tmp_path / "out", "--steps", 2]
    status, _, errors = said("sft", *words, "--batch-tokens", 96, "--dtype", "float32")
    assert status == 0, errors
