"""Versions belong to eras, and norm scales are evidence for an era."""

import pytest

from openpalm.convert.eras import ERAS, NEWEST, era_of, guess_era, is_known_version
from openpalm.errors import CheckpointError


@pytest.mark.parametrize(
    ("version", "first"),
    [
        ("0.0.2", "0.0.2"),
        ("0.0.30", "0.0.30"),
        ("0.0.50", "0.0.50"),
        ("0.0.61", "0.0.50"),
        ("0.0.68", "0.0.50"),
        ("0.1.4", "0.1.0"),
        ("0.2", "0.1.0"),
        ("v0.2.1", "0.2.1"),
        ("0.2.3", "0.2.1"),
        ("0.2.4", "0.2.4"),
        ("0.7.5", "0.2.4"),
        ("0.8.0", "0.2.4"),
    ],
)
def test_versions(version: str, first: str):
    assert era_of(version).first == first
    assert is_known_version(version)


@pytest.mark.parametrize(
    "version",
    ["", "new", "0.0.3", "0.0.69", "0.8.1", "1", "1.0", "-1.0.0", "0.2.1.0", "0.2.1 ", "٠.٢.١"],
)
def test_nonsense_lists_the_eras(version: str):
    with pytest.raises(CheckpointError) as caught:
        era_of(version)
    assert all(str(era) in str(caught.value) for era in ERAS)
    assert not is_known_version(version)


def test_guesses():
    def first(gamma: float, **signs: bool) -> str:
        return guess_era(gamma, **({"has_scale": True, "norm_unused": False} | signs))[0].first

    assert first(0.03) == NEWEST.first
    assert first(0.97) == "0.2.1"
    assert first(0.97, norm_unused=True) == "0.1.0"
    assert first(0.97, has_scale=False) == "0.0.2"
    assert first(0.97, has_scale=False, norm_unused=True) == "0.0.30"
    assert not guess_era(0.03, has_scale=False, norm_unused=False)[0].xpos
