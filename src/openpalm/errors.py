"""Every error OpenPaLM raises on purpose, and the exit status each one means.

    OpenPalmError
    ├── RequestError            the request was wrong: exit 2
    │   ├── SettingsError       an option, a settings file, or values that contradict each other
    │   ├── DataError           a text, record or tokenizer that cannot be used
    │   └── CheckpointError     a checkpoint missing, torn, altered, foreign or of another model
    └── WorkError               the request was right but the work failed: exit 1
        ├── StorageError        the disk is full or refuses us
        ├── NumbersError        the model computed numbers that are not finite
        ├── RewardError         a reward function failed, or gave no finite number
        └── TrainingError       the run diverged or could not go on

A message says what is wrong, which value, and what to do, in one line.
"""


def count_of(number: int, noun: str) -> str:
    """A number of things as a message says it: `1 row`, `2,048 rows`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def one_line(text: object, most: int | None = None) -> str:
    """A message, often of another library's error, on one line of at most `most` characters."""
    return " ".join(str(text).split())[:most]


class OpenPalmError(Exception):
    """Base of all errors raised on purpose; its text is the line a user reads."""

    exit_status = 1


class RequestError(OpenPalmError):
    exit_status = 2


class SettingsError(RequestError):
    pass


class DataError(RequestError):
    pass


class CheckpointError(RequestError):
    pass


class WorkError(OpenPalmError):
    exit_status = 1


class StorageError(WorkError):
    pass


class NumbersError(WorkError):
    pass


class RewardError(WorkError):
    """A reward failed at an answer; corrected, the run continues."""


class TrainingError(WorkError):
    pass
