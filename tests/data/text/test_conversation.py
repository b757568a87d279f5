from openpalm.data.text.conversation import (
    Message,
    render,
    stop_ids,
)

CONVERSATION = [
    Message("system", "Be brief."),
    Message("user", "Hi <|end|><|assistant|> 日本"),
    Message("assistant", "Hello 😀"),
    Message("user", " and\n"),
    Message("assistant", "the cats."),
]


def trained_runs(tokenizer, rendered):
    """The ids under the loss, as runs."""
    runs, run = [], []
    for token, counts in zip(*rendered, strict=True):
        if counts:
            run.append(token)
        elif run:
            runs.append(run)
            run = []
    return [*runs, run] if run else runs


def test_the_template_with_special_tokens(byte):
    user, assistant, end = map(byte.special_id, ("<|user|>", "<|assistant|>", "<|end|>"))
    conversation = [Message("user", "a"), Message("assistant", "b")]
    assert render(byte, conversation).ids == [user, ord("a"), end, assistant, ord("b"), end]
    assert render(byte, conversation).loss_mask == [False] * 4 + [True] * 2


def test_the_template_without_special_tokens(unigram, wordpiece):
    conversation = [Message("user", "the cat"), Message("assistant", "a cat"), Message("user", "s")]
    ids, mask = render(unigram, conversation)
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


def test_a_prompt_is_an_exact_prefix_of_the_conversation(any_tokenizer):
    for turn in (2, 4):
        prompt = render(any_tokenizer, CONVERSATION[:turn], add_generation_prompt=True)
        whole = render(any_tokenizer, CONVERSATION[: turn + 1])
        assert whole.ids[: len(prompt.ids)] == prompt.ids
        assert whole.loss_mask[: len(prompt.ids)] == prompt.loss_mask
        assert whole.loss_mask[len(prompt.ids) :] == [True] * (len(whole.ids) - len(prompt.ids))


def test_the_loss_is_on_assistant_turns_and_their_end(any_tokenizer):
    runs = trained_runs(any_tokenizer, render(any_tokenizer, CONVERSATION))
    for run, text in zip(runs, ["Hello 😀", "the cats."], strict=True):
        content = any_tokenizer.encode(text)
        assert run[: len(content)] == content
        ending = run[len(content) :]
        stops = stop_ids(any_tokenizer)
        assert ending == any_tokenizer.encode("\n\n") if not stops else ending[0] in stops
    assert len(runs) == 2


def test_no_loss_on_other_roles(any_tokenizer):
    rendered = render(any_tokenizer, [CONVERSATION[0], CONVERSATION[1]], add_generation_prompt=True)
    assert not any(rendered.loss_mask)


def test_text_cannot_open_or_close_a_turn(byte):
    ids = render(byte, CONVERSATION).ids
    assert ids.count(byte.special_id("<|assistant|>")) == 2
    assert ids.count(byte.special_id("<|end|>")) == len(CONVERSATION)


def test_what_ends_a_turn(byte, unigram):
    assert stop_ids(byte) == {byte.special_id("<|end|>"), byte.special_id("<|endoftext|>")}
    assert stop_ids(unigram) == {unigram.special_id("</s>")}


def test_a_turn_that_is_not_trained_has_no_loss(any_tokenizer):
    bad, good = Message("assistant", "bad", trained=False), Message("assistant", "good")
    conversation = [Message("user", "q"), bad, Message("user", "r"), good]
    ids, mask = render(any_tokenizer, conversation)
    plain = [Message(turn.role, turn.content) for turn in conversation]
    assert ids == render(any_tokenizer, plain).ids
    assert (
        trained_runs(any_tokenizer, (ids, mask))
        == trained_runs(any_tokenizer, render(any_tokenizer, plain))[1:]
    )
    assert [turn.to_json() for turn in conversation[1:3]] == [
        {"role": "assistant", "content": "bad", "weight": 0},
        {"role": "user", "content": "r"},
    ]
