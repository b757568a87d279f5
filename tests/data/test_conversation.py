import pytest

from openpalm.data.conversation import (
    Message,
    parse_messages,
    render,
    stop_ids,
)
from openpalm.errors import DataError

TALK = [
    Message("system", "Be brief."),
    Message("user", "Hi <|end|><|assistant|> 日本"),
    Message("assistant", "Hello 😀"),
    Message("user", " and\n"),
    Message("assistant", "the cats."),
]


def learnt(tokenizer, rendered):
    """The ids under the loss, as runs."""
    runs, run = [], []
    for token, counts in zip(rendered.ids, rendered.loss_mask, strict=True):
        if counts:
            run.append(token)
        elif run:
            runs.append(run)
            run = []
    return [*runs, run] if run else runs


def test_the_template_with_markers(byte):
    user, assistant, end = map(byte.special_id, ("<|user|>", "<|assistant|>", "<|end|>"))
    talk = [Message("user", "a"), Message("assistant", "b")]
    assert render(byte, talk).ids == [user, ord("a"), end, assistant, ord("b"), end]
    assert render(byte, talk).loss_mask == [False] * 4 + [True] * 2


def test_the_template_without_markers(unigram, wordpiece):
    talk = [Message("user", "the cat"), Message("assistant", "a cat"), Message("user", "s")]
    ids, mask = render(unigram, talk)
    answer = unigram.encode("a cat")
    end = unigram.end_of_text
    asked = [unigram.encode(part) for part in ("User: ", "the cat", "\n\n", "Assistant: ")]
    before = [i for part in asked for i in part]
    assert ids[: len(before) + len(answer) + 1] == [*before, *answer, end]
    assert mask[: len(before) + len(answer) + 1] == [False] * len(before) + [True] * len(
        [*answer, end]
    )
    assert not any(mask[len(before) + len(answer) + 1 :])
    assert stop_ids(wordpiece) == frozenset()


def test_a_prompt_is_an_exact_prefix_of_its_answer(any_tokenizer):
    for turn in (2, 4):
        prompt = render(any_tokenizer, TALK[:turn], answer_next=True)
        whole = render(any_tokenizer, TALK[: turn + 1])
        assert whole.ids[: len(prompt.ids)] == prompt.ids
        assert whole.loss_mask[: len(prompt.ids)] == prompt.loss_mask
        assert whole.loss_mask[len(prompt.ids) :] == [True] * (len(whole.ids) - len(prompt.ids))


def test_the_loss_is_on_what_the_assistant_says_and_on_its_ending(any_tokenizer):
    runs = learnt(any_tokenizer, render(any_tokenizer, TALK))
    for run, text in zip(runs, ["Hello 😀", "the cats."], strict=True):
        said = any_tokenizer.encode(text)
        assert run[: len(said)] == said
        ending = run[len(said) :]
        stops = stop_ids(any_tokenizer)
        assert ending == any_tokenizer.encode("\n\n") if not stops else ending[0] in stops
    assert len(runs) == 2


def test_nothing_is_learnt_from_other_roles(any_tokenizer):
    rendered = render(any_tokenizer, [TALK[0], TALK[1]], answer_next=True)
    assert not any(rendered.loss_mask)


def test_text_cannot_open_or_close_a_turn(byte):
    ids = render(byte, TALK).ids
    assert ids.count(byte.special_id("<|assistant|>")) == 2
    assert ids.count(byte.special_id("<|end|>")) == len(TALK)


def test_what_ends_a_turn(byte, unigram):
    assert stop_ids(byte) == {byte.special_id("<|end|>"), byte.special_id("<|endoftext|>")}
    assert stop_ids(unigram) == {unigram.special_id("</s>")}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([], '"messages" must be a list of at least one'),
        ({}, "it is missing"),
        ({"messages": "hi"}, "it is a str"),
        ({"messages": []}, "must be a list of at least one"),
        ({"messages": ["hi"]}, r"messages\[0\] is a str"),
        ({"messages": [{"content": "a"}]}, '"role" is missing; it must be system, user, assistant'),
        ({"messages": [{"role": "bot\n", "content": "a"}]}, r"\"role\" is 'bot\\n'"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, '"role" is a list'),
        ({"messages": [{"role": "user"}]}, '"content" is missing; it must be a text'),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": 1}]},
            r'messages\[1\]: "content" is a int',
        ),
    ],
)
def test_rows_that_are_no_conversations(row, says):
    with pytest.raises(DataError, match=says) as error:
        parse_messages(row, "talks.jsonl:4")
    assert str(error.value).startswith("talks.jsonl:4: ")
