"""`openpalm simulate-labelers`: labelers of known taste judge a project's items over its API."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from openpalm.base.settings import check_field, parse
from openpalm.errors import SettingsError, count_of


@dataclass(frozen=True)
class SimulateSettings:
    """The site, the project, and who judges how."""

    url: str
    """address of `openpalm feedback`"""
    project: str
    """the project's name in URLs"""
    token_file: Path
    """tokens, one a line, as `openpalm feedback manage create_labelers` prints them"""
    taste: str = "exact,warm,brief"
    """tastes of the labelers, in turn, separated by commas"""
    noise: float = 0.15
    """share of judgements that name the wrong side"""
    labelers: int = 3
    """how many of the tokens are used, each by one labeler"""
    count: int | None = None
    """judgements in total; default: until nothing is left"""
    seed: int = 0
    """random seed of the noise"""

    def __post_init__(self) -> None:
        check_field(self, "noise", lambda v: 0 <= v <= 0.5, "from 0 to 0.5")
        check_field(self, "labelers", lambda v: v >= 1, "1 or more")
        check_field(self, "count", lambda v: v >= 1, "1 or more")
        _tastes(self.taste)


def run(argv: Sequence[str]) -> None:
    settings = parse(
        SimulateSettings,
        argv,
        verb="simulate-labelers",
        about="Judges a project's items as labelers of known taste, over the REST API. Their "
        "judgements are marked simulated everywhere and never counted among people's.",
        examples=[
            "openpalm feedback manage create_labelers demo --count 3 > tokens.txt",
            "openpalm simulate-labelers --url http://127.0.0.1:8080 --project demo "
            "--token-file tokens.txt",
        ],
    )
    from openpalm.feedback.simulation.labeler import Labeler
    from openpalm.feedback.simulation.session import simulate
    from openpalm.feedback.simulation.tastes import TASTES

    tokens = _tokens(settings.token_file, settings.labelers)
    tastes = cycle(_tastes(settings.taste))
    pairs = [
        (token, Labeler(TASTES[next(tastes)], f"{settings.seed} {number}", settings.noise))
        for number, token in enumerate(tokens)
    ]
    made = simulate(settings.url, settings.project, pairs, settings.count)
    surplus = f"; {made['surplus']} came too late to count" if made["surplus"] else ""
    left = "" if made.total() == settings.count else "; nothing is left to judge"
    print(f"{made['counted']} judgements by {len(pairs)} simulated labelers{surplus}{left}")


def _tastes(text: str) -> list[str]:
    from openpalm.feedback.simulation.tastes import TASTES

    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TASTES:
            raise SettingsError(f"--taste {name}: must be one of {', '.join(TASTES)}")
    return names


def _tokens(path: Path, count: int) -> list[str]:
    """The last word of each line. Raises SettingsError if there are fewer than `count`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        raise SettingsError(f"--token-file {path}: cannot be read ({reason})") from None
    tokens = [line.split()[-1] for line in lines if line.strip()]
    if len(tokens) < count:
        raise SettingsError(
            f"--token-file {path}: has {count_of(len(tokens), 'token')} for "
            f"{count_of(count, 'labeler')}; give --labelers {len(tokens) or 1}, or make more with "
            "`openpalm feedback manage create_labelers`"
        )
    return tokens[:count]
