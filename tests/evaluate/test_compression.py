"""Compression baselines: the byte model against a direct implementation, inputs of gzip and xz."""

import dataclasses
import json
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from openpalm.data.dataset.shards import open_dataset
from openpalm.data.prepare.preparation import PrepareRequest, prepare
from openpalm.errors import DataError
from openpalm.evaluate import compression

_path = Path(__file__).resolve().parents[2] / "benchmarks" / "compression.py"
WittenBell = compression.WittenBell

TRAINING = [
    b"the cat sat on the mat",
    b"the dog sat on the log and the cat sat on the dog",
    b"",
    bytes([0, 255, 0, 255, 128]),
    b"a cat and a dog and a mat",
]
HELD_OUT = [b"the cat and the dog sat on a log", b"", b"a mat", bytes([7, 255, 0])]


def written_out(training, context, symbol, order):
    """The recursion as the docstring gives it, counted again at every call."""
    p = 1 / 256
    for length in range(order + 1):
        follow = Counter()
        wanted = ([None] * order + list(context))[len(context) + order - length :]
        for document in training:
            padded = [None] * order + list(document)
            for at in range(order, len(padded)):
                if padded[at - length : at] == wanted:
                    follow[padded[at]] += 1
        if follow:
            total, kinds = follow.total(), len(follow)
            p = (follow[symbol] + kinds * p) / (total + kinds)
    return p


def test_hand_computed_example():
    # After "aab": order 0 saw a twice and b once; "a" was followed by a and b; a began.
    model = WittenBell([b"aab"], order=1)
    order_0 = {"a": (2 + 2 / 256) / 5, "b": (1 + 2 / 256) / 5, "c": (2 / 256) / 5}
    first = model.probabilities(b"")
    after_a = model.probabilities(b"a")
    for letter, seen_first, seen_after_a in (("a", 1, 1), ("b", 0, 1), ("c", 0, 0)):
        base = order_0[letter]
        assert first[ord(letter)] == pytest.approx((seen_first + base) / 2, rel=1e-12)
        assert after_a[ord(letter)] == pytest.approx((seen_after_a + 2 * base) / 4, rel=1e-12)
    # "c" never occurred, so what follows it is order 0.
    assert model.probabilities(b"c")[ord("b")] == pytest.approx(order_0["b"], rel=1e-12)
    expected = -math.log2(first[ord("a")]) - math.log2(after_a[ord("b")])
    assert model.bits([b"ab"]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("order", [0, 1, 3, 5])
def test_matches_the_written_out_recursion(order):
    model = WittenBell(TRAINING, order=order)
    expected = -sum(
        math.log2(written_out(TRAINING, document[:at], symbol, order))
        for document in HELD_OUT
        for at, symbol in enumerate(document)
    )
    assert model.bits(HELD_OUT) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("order", range(6))
def test_probabilities_sum_to_one(order):
    model = WittenBell(TRAINING, order=order)
    draw = random.Random(order)
    contexts = [b"", b"the c", b"zzzzzz", bytes(range(250, 256)), b"on the mat"]
    contexts += [draw.randbytes(draw.randrange(9)) for _ in range(50)]
    text = b"".join(TRAINING)
    contexts += [text[at : at + 7] for at in draw.sample(range(len(text)), 20)]
    for context in contexts:
        p = model.probabilities(context)
        assert p.shape == (256,)
        assert (p > 0).all()
        assert p.sum() == pytest.approx(1, abs=1e-12)


def test_bits_are_the_probabilities():
    model = WittenBell(TRAINING)
    document = HELD_OUT[0]
    by_byte = [model.probabilities(document[:at])[b] for at, b in enumerate(document)]
    assert model.bits([document]) == pytest.approx(-np.log2(by_byte).sum(), rel=1e-12)


def test_documents_do_not_see_each_other():
    model = WittenBell(TRAINING)
    alone = sum(model.bits([document]) for document in HELD_OUT)
    assert model.bits(HELD_OUT) == pytest.approx(alone, rel=1e-12)


def test_longer_contexts_help_on_text():
    source = Path(random.__file__).read_bytes().split(b"\n\n")
    training, held_out = source[::2], source[1::2]
    bits = [WittenBell(training, order=order).bits(held_out) for order in (0, 1, 2, 5)]
    assert bits == sorted(bits, reverse=True)
    assert bits[3] < 0.7 * bits[0]


@pytest.mark.parametrize(
    ("training", "order", "message"),
    [([b"a"], 6, r"order \(6\)"), ([], 5, "training text is empty"), ([b""], 0, "is empty")],
)
def test_refuses_what_it_cannot_count(training, order, message):
    with pytest.raises(ValueError, match=message):
        WittenBell(training, order=order)


def test_priming_pays_for_what_was_seen():
    draw = random.Random(0)
    seen, between, fresh = draw.randbytes(5000), draw.randbytes(300_000), draw.randbytes(5000)
    assert compression.primed_xz_bits(seen + between, seen) < 0.2 * 8 * len(seen)
    assert compression.primed_xz_bits(seen + between, fresh) > 0.99 * 8 * len(fresh)
    assert compression.gzip_bits(seen) > 0.99 * 8 * len(seen)


@pytest.fixture(scope="module")
def texts():
    return [f"Document {i}: {'naïve ' * (i % 7)}{i * i} words — ✓\n" for i in range(60)]


@pytest.fixture(scope="module", params=["byte", "bpe:300"])
def prepared(request, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = folder / "prepared"
    prepare(PrepareRequest(inputs=[str(source)], out=out, tokenizer=request.param, val="tail:0.3"))
    return out


def test_documents_are_the_bytes_that_went_in(prepared, texts):
    dataset = open_dataset(prepared)
    training, validation = (compression.documents(dataset, split) for split in ("train", "val"))
    assert b"".join(training + validation) == "".join(texts).encode()
    wanted = {text.encode() for text in texts}
    assert wanted.issuperset(training[:-1] + validation[1:])  # the seam may cut one document


def test_documents_refuse_tokens_that_lost_text(prepared):
    dataset = open_dataset(prepared)
    short = dataclasses.replace(dataset.manifest.splits["val"], bytes=7)
    manifest = dataclasses.replace(dataset.manifest, splits={"val": short})
    with pytest.raises(DataError, match="7 went in"):
        compression.documents(dataclasses.replace(dataset, manifest=manifest), "val")


def test_program_prints_the_figures(prepared):
    def run(*words):
        return subprocess.run([sys.executable, _path, *words], capture_output=True, text=True)

    figures = json.loads(run(prepared, "--json").stdout)
    assert figures["val_bytes"] == open_dataset(prepared).manifest.splits["val"].bytes
    assert list(figures["bits_per_byte"]) == [
        "gzip -9",
        "xz -9e primed with the training text",
        "order-5 Witten-Bell byte model",
    ]
    table = run(prepared).stdout
    assert all(f"{value:.3f}" in table for value in figures["bits_per_byte"].values())
    refused = run(prepared / "nowhere")
    assert refused.returncode == 2
    assert "no prepared dataset" in refused.stderr
