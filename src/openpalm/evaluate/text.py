"""Bits per byte of a model on texts that were not prepared."""

from collections.abc import Sequence

from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import DataError, SettingsError
from openpalm.evaluate.perplexity import SplitLoss
from openpalm.evaluate.scoring import Advance, Pair, rolling_windows, score_pairs
from openpalm.generate.engine import Engine


def text_windows(
    tokenizer: Tokenizer, texts: Sequence[str], length: int, overlap: int
) -> list[Pair]:
    """The windows of every text; each text begins after an end-of-text token.

    Raises SettingsError for a tokenizer without that token, DataError for a text that the
    tokenizer cannot represent, because its missing bytes would count as predicted.
    """
    prefix = tokenizer.end_of_text
    if prefix is None:
        raise SettingsError("the tokenizer has no end-of-text token, which precedes a text")
    pairs = []
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if lost := tokenizer.lost_bytes(text, ids):
            raise DataError(
                f"the tokenizer cannot represent {lost:,} bytes of the text, so bits per byte "
                "would be too low; use a text in the tokenizer's characters"
            )
        pairs += rolling_windows(ids, prefix, length, overlap)
    return pairs


def text_loss(
    engine: Engine, windows: Sequence[Pair], text_bytes: int, advance: Advance = lambda more: None
) -> SplitLoss:
    """The loss over `windows` of texts with `text_bytes` bytes of UTF-8."""
    scores = score_pairs(engine, windows, advance)
    tokens = sum(len(pair.continuation) for pair in windows)
    return SplitLoss(-sum(score.log_prob for score in scores), tokens, text_bytes)
