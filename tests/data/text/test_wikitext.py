"""Pairs of text as WikiText has it and as it was written, by hand."""

import pytest

from openpalm.data.text.wikitext import detokenize_wikitext

PAIRS = [
    (" = Valkyria Chronicles III = ", "= Valkyria Chronicles III ="),
    (" = = Gameplay = = ", "== Gameplay =="),
    (" = = = Cast ( Japan ) = = = ", "=== Cast (Japan) ==="),
    ("It sold 102 @,@ 779 copies .", "It sold 102,779 copies."),
    ("a real @-@ time game , 3 @.@ 5 km away ;", "a real-time game, 3.5 km away;"),
    ('He said : " Run ! " and ran .', 'He said: "Run!" and ran.'),
    ('" Yes , " she said , " no . "', '"Yes," she said, "no."'),
    ("the ( long [ 1963 ] ) march", "the (long [1963]) march"),
    ("I don 't know , it 's Tom 's and we 'll see .", "I don't know, it's Tom's and we'll see."),
    ("the players ' game and Jones ' hat", "the players' game and Jones' hat"),
    ("the ' Big Three ' of it", "the 'Big Three' of it"),
    ("about 40 % of $ 5 million or £ 3", "about 40% of $5 million or £3"),
    ("at 25 ° C and a 90 ° turn", "at 25°C and a 90° turn"),
    ('an odd " quote', 'an odd " quote'),
    ("<unk> = x", "<unk> = x"),
    (" one . \n \n two , three . \n", "one.\n\ntwo, three.\n"),
    ("nothing to do: 'as-is' (\"it\"), 1,000.", "nothing to do: 'as-is' (\"it\"), 1,000."),
    ("", ""),
]


@pytest.mark.parametrize(("tokenized", "written"), PAIRS)
def test_pairs(tokenized, written):
    assert detokenize_wikitext(tokenized) == written


def test_a_line_of_many_quotes():
    """Once a quote looked for its partner in the whole rest of its line."""
    assert detokenize_wikitext("' a ' b " * 30_000) == ("'a' b " * 30_000).rstrip()
