"""Attention inside documents: the loss of each piece of a window alone, in training and outside."""

from dataclasses import replace
from itertools import islice, pairwise

import pytest
import torch
import torch.nn.functional as F
from train_samples import made, tiny

from openpalm.data.batches.loader import IGNORE, evaluation_batches, token_loader
from openpalm.data.batches.token_mixture import open_sets
from openpalm.data.prepare.preparation import PrepareRequest, prepare
from openpalm.train.objective import NextToken

LENGTH = 24


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two sets of short documents, in shards that cut some of them."""
    folder = tmp_path_factory.mktemp("short")
    for name, times in (("words", 3), ("verse", 5)):
        rows = "".join(f'{{"text": "{name} {i} {"la " * (i % times)}"}}\n' for i in range(60))
        (folder / f"{name}.jsonl").write_text(rows)
        prepare(
            PrepareRequest(
                inputs=[str(folder / f"{name}.jsonl")],
                out=folder / name,
                tokenizer="byte",
                val="tail:0.2",
                shard_tokens=200,
            )
        )
    (folder / "mix.yaml").write_text("tasks: [{data: words}, {data: verse}]")
    return open_sets(folder / "mix.yaml")


@pytest.fixture(scope="module")
def model(sets):
    return made(tiny(vocab_size=sets.datasets[0].manifest.vocab_size, context=LENGTH)).double()


def training(sets):
    loader = token_loader(
        sets.tokens("train"),
        sequence_length=LENGTH,
        rows=6,
        seed=1,
        draws=sets.draws(LENGTH, 1),
        documents=sets.documents("train"),
    )
    return list(islice(loader, 4))


def validation(sets):
    return list(
        evaluation_batches(
            sets.tokens("val"), sequence_length=LENGTH, rows=3, documents=sets.documents("val")
        )
    )


def pieces(batch, ends):
    """Each row cut after every token that ends a document: (inputs, targets)."""
    for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
        cuts = [0, *((inputs == ends).nonzero()[:, 0] + 1).tolist(), len(inputs)]
        for start, stop in pairwise(cuts):
            if start < stop:
                yield inputs[None, start:stop], targets[start:stop]


def check_each_document_is_alone(model, batch, ends):
    """Loss and gradient of a batch against one piece of a document at a time."""

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    together, _ = NextToken().loss(model, batch)
    alone = sum(
        F.cross_entropy(model.logits(inputs)[0], targets, ignore_index=IGNORE, reduction="sum")
        for inputs, targets in pieces(batch, ends)
    )
    assert abs(together - alone) < 1e-6 * abs(alone)
    for a, b in zip(gradients(together), gradients(alone), strict=True):
        assert (a - b).abs().max() < 2e-6 * max(1, b.abs().max())


@pytest.mark.parametrize("batches_of", [training, validation])
def test_each_document_is_computed_alone(sets, model, batches_of):
    # The end mark is in the tokens: the index is not what we compare with.
    ends = sets.datasets[0].tokenizer().end_of_text
    batches = batches_of(sets)
    assert any((batch.inputs[:, :-1] == ends).any() for batch in batches)
    for batch in batches:
        check_each_document_is_alone(model, batch, ends)


def test_what_goes_wrong_is_noticed(sets, model):
    ends = sets.datasets[0].tokenizer().end_of_text
    batch = training(sets)[0]
    for segments in (None, batch.segments.roll(1, dims=1), torch.zeros_like(batch.segments)):
        with pytest.raises(AssertionError):
            check_each_document_is_alone(model, replace(batch, segments=segments), ends)


def test_the_same_tokens_count_with_and_without(sets):
    """So that losses of runs with and without it compare."""
    plain = evaluation_batches(sets.tokens("val"), sequence_length=LENGTH, rows=3)
    for batch, other in zip(validation(sets), plain, strict=True):
        assert torch.equal(batch.inputs, other.inputs)
        assert torch.equal(batch.targets, other.targets)
        assert other.segments is None
