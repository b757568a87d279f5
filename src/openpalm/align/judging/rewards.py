"""What an answer is worth: functions, reward models and exact matches behind one call.

A source is named in a word, `[WEIGHT*]SOURCE`:

    FILE.py:FUNCTION   called with (prompt, answer, row): the last question, the answer's text and
                       the prompt's row from the data; returns a number. The user's own code.
    RUN or CHECKPOINT  a reward model of `openpalm reward`, reading the same tokenizer's ids
    hub:NAME           a sequence classifier for `transformers`: its logit, or with several classes
                       the last class's log-odds
    rules:FILE@CHECKPOINT  minus the weighted mean probability that the answer breaks a rule of the
                       YAML file, as the checkpoint says (align/judging/judge.py)
    exact              1 where the answer is the row's `answer`, else 0

Several are added up with their weights.
"""

import copy
import hashlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from openpalm.align.judging.judge import LABEL_TOKENS, EngineJudge, rule_questions, rule_reward
from openpalm.align.pairs.reward import RatingRecord, collate
from openpalm.align.rollouts.rollout_batch import Answer, Reward, record_of
from openpalm.base.settings import spell
from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint.manifest import read_manifest
from openpalm.data.rows.constitution import read_constitution
from openpalm.data.rows.preferences import Messages
from openpalm.data.text.conversation import Message
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import CheckpointError, RewardError, SettingsError, WorkError
from openpalm.generate.engine import Engine
from openpalm.model.reward import RewardModel

LARGEST = 1e9
"""The largest reward, on either side: its square is still a number in float32."""


class Asked(NamedTuple):
    """A prompt as a reward sees it."""

    question: str
    """what the user said last"""
    row: dict[str, Any]


@dataclass(frozen=True)
class Reader:
    """Answers' ids as texts, and the prompts they are to."""

    tokenizer: Tokenizer
    asked: Sequence[Asked]
    stop_ids: frozenset[int]

    def text(self, answer: Answer) -> str:
        """Without its end marker."""
        return self.tokenizer.decode([i for i in answer.ids if i not in self.stop_ids])


def question_of(prompt: Messages) -> str:
    """The last turn of the user."""
    return next((m.content for m in reversed(prompt) if m.role == "user"), "")


def rewards_of(words: Sequence[str], reader: Reader, option: str = "reward") -> Reward:
    """The sum of the sources that `words` name. Raises SettingsError or CheckpointError.

    When called, raises WorkError for a sum that is not finite, or larger than LARGEST.
    """
    named = [_weight_and_source(word, option) for word in words]
    parts = [(weight, source_of(source, reader, option)) for weight, source in named]

    def total(answers: Sequence[Answer]) -> list[float]:
        columns = [[weight * value for value in part(answers)] for weight, part in parts]
        sums = [sum(values, 0.0) for values in zip(*columns, strict=True)]
        for value, answer in zip(sums, answers, strict=True):
            if not abs(value) <= LARGEST:
                text = reader.text(answer)[:60]
                raise WorkError(
                    f"{spell(option)} {', '.join(words)}: the reward of the answer {text!a} is "
                    f"{value:g}; it must be a number from -{LARGEST:g} to {LARGEST:g}"
                )
        return sums

    return total


def fingerprint(words: Sequence[str], option: str = "reward") -> str:
    """A hash of the files that the sources are made of: the same words can name other ones.

    Of a FILE.py its own text, not what it imports; of a checkpoint its manifest's hash.
    """
    found = hashlib.sha256()
    for word in words:
        _, source = _weight_and_source(word, option)
        path, colon, _ = source.rpartition(":")
        rules, _, judge = source.removeprefix("rules:").partition("@")
        if colon and path.endswith(".py"):
            found.update(Path(path).read_bytes())
        elif source.startswith("rules:"):
            found.update(Path(rules).read_bytes() + _manifest_hash(judge))
        elif Path(source).exists():
            found.update(_manifest_hash(source))
        found.update(b"\0")
    return found.hexdigest()


def _manifest_hash(path: str) -> bytes:
    return read_manifest(checkpoint.resolve(path))["sha256"].encode()


def _weight_and_source(word: str, option: str) -> tuple[float, str]:
    before, star, after = word.partition("*")
    try:
        weight, source = (float(before), after) if star else (1.0, word)
    except ValueError:
        weight, source = math.nan, ""
    if not math.isfinite(weight):
        raise SettingsError(
            f"{spell(option)} {word}: {before!r} is no weight; write it as 0.5*SOURCE"
        )
    return weight, source.strip()


def source_of(word: str, reader: Reader, option: str = "reward") -> Reward:
    """One source. Raises SettingsError or CheckpointError, naming it."""
    path, colon, name = word.rpartition(":")
    if word == "exact":
        return lambda answers: [exact(reader, answer) for answer in answers]
    if colon and path.endswith(".py"):
        return of_function(_function(Path(path), name, option), word, reader, option)
    if word.startswith("rules:"):
        return of_rules(word, reader, option)
    if word.startswith("hub:"):
        return of_classifier(word.removeprefix("hub:"), reader, option)
    if Path(word).exists():
        return of_model(Path(word), reader, option)
    raise SettingsError(
        f"{spell(option)} {word}: no such run; give a reward model's, FILE.py:FUNCTION, "
        "hub:NAME, rules:FILE@CHECKPOINT or exact"
    )


def exact(reader: Reader, answer: Answer) -> float:
    """Whether the answer is the row's own."""
    wanted = reader.asked[answer.prompt].row.get("answer")
    return float(wanted is not None and reader.text(answer).strip() == str(wanted).strip())


def of_function(
    function: Callable[[str, str, dict[str, Any]], Any],
    name: str,
    reader: Reader,
    option: str = "reward",
) -> Reward:
    """Of a function of (prompt, answer, row).

    Each call gets its own copy of the row. When called, raises WorkError where the function raises
    or exits, or returns no finite number.
    """

    def reward_of(answer: Answer) -> float:
        asked, text = reader.asked[answer.prompt], reader.text(answer)
        try:
            value = function(asked.question, text, copy.deepcopy(asked.row))
        except (Exception, SystemExit) as error:
            raise failed(f"raised {type(error).__name__} ({error})", text) from error
        try:
            number = math.nan if isinstance(value, str) else float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise failed(f"returned {value!r:.60}, which is no finite number,", text)
        return number

    def failed(what: str, text: str) -> RewardError:
        return RewardError(
            f"{spell(option)} {name}: {what} for the answer {text[:60]!a}; "
            "correct it and give the same command, which goes on"
        )

    return lambda answers: [reward_of(answer) for answer in answers]


def of_model(path: Path, reader: Reader, option: str = "reward", rows: int = 32) -> Reward:
    """Of a reward model. Raises CheckpointError where it is none or reads other ids."""
    directory = checkpoint.resolve(path)
    model = checkpoint.load(directory)
    if not isinstance(model, RewardModel):
        raise CheckpointError(
            f"{spell(option)} {directory}: is no reward model; train one with `openpalm reward`"
        )
    text = checkpoint.tokenizer_json(directory)
    if text is not None and (
        Tokenizer.load(directory / "tokenizer.json").digest != reader.tokenizer.digest
    ):
        raise CheckpointError(
            f"{spell(option)} {directory}: reads another tokenizer's ids than the policy; train it "
            "from a checkpoint with the policy's tokenizer"
        )
    model.requires_grad_(False)

    @torch.no_grad()
    def reward(answers: Sequence[Answer]) -> list[float]:
        values: list[float] = []
        for start in range(0, len(answers), rows):
            group = answers[start : start + rows]
            batch = collate([RatingRecord(record_of(answer), 0.0) for answer in group])
            values += model.value(batch.ids, batch.mask, batch.prompt_lengths).tolist()
        return values

    return reward


def of_rules(word: str, reader: Reader, option: str = "reward") -> Reward:
    """Of `rules:FILE@CHECKPOINT`. Raises DataError for a bad file, WorkError for a long answer."""
    file, mark, path = word.removeprefix("rules:").partition("@")
    if not (file and mark and path):
        raise SettingsError(f"{spell(option)} {word}: must be rules:FILE.yaml@CHECKPOINT")
    rules = read_constitution(Path(file), "rules")
    directory = checkpoint.resolve(path)
    checkpoint.check_generates_text(directory)
    if checkpoint.tokenizer_json(directory) is None:
        raise CheckpointError(f"{spell(option)} {word}: the checkpoint has no tokenizer.json")
    tokenizer = Tokenizer.load(directory / "tokenizer.json")
    judge = EngineJudge(Engine(checkpoint.load(directory), slots=32, owned=True), tokenizer, word)

    def reward(answers: Sequence[Answer]) -> list[float]:
        questions = [
            question
            for answer in answers
            for question in rule_questions(
                (Message("user", reader.asked[answer.prompt].question),), reader.text(answer), rules
            )
        ]
        if not all(judge.fits(question.text, LABEL_TOKENS) for question in questions):
            raise WorkError(
                f"{spell(option)} {word}: an answer with its prompt and rule is longer than that "
                "checkpoint's context; lower --max-new-tokens, or take another judge"
            )
        # An answer needs a number, so even an unlikely yes or no counts.
        broken = [chance for chance, _ in judge.chances(questions)]
        each = len(rules.articles)
        parts = [broken[start : start + each] for start in range(0, len(broken), each)]
        return [rule_reward(part, rules) for part in parts]

    return reward


def of_classifier(name: str, reader: Reader, option: str = "reward") -> Reward:
    """Of a sequence classifier on the hub, or in a folder. SettingsError where there is none.

    Only safetensors are read, and no code of the repository is run.
    """
    where = f"{spell(option)} hub:{name}"
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        raise SettingsError(
            f"{where}: needs the package transformers; pip install transformers"
        ) from None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, trust_remote_code=False, use_safetensors=True
        ).eval()
    except (OSError, ValueError) as error:
        raise SettingsError(f"{where}: cannot be read ({error}); check the name") from error

    @torch.no_grad()
    def reward(answers: Sequence[Answer]) -> list[float]:
        texts = [reader.text(answer) for answer in answers]
        batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True)
        logits = model(**batch).logits.float()
        if logits.shape[-1] == 1:
            return logits[:, 0].tolist()
        chances = logits.log_softmax(dim=-1)
        others = chances[:, :-1].logsumexp(dim=-1)
        return (chances[:, -1] - others).tolist()

    return reward


def _function(path: Path, name: str, option: str) -> Callable[..., Any]:
    if not path.is_file():
        raise SettingsError(f"{spell(option)} {path}:{name}: no such file; check the path")
    spec = importlib.util.spec_from_file_location(f"reward {path}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise SettingsError(
            f"{spell(option)} {path}: cannot be imported ({type(error).__name__}: {error})"
        ) from error
    function: Any = getattr(module, name, None)
    if not callable(function):
        raise SettingsError(f"{spell(option)} {path}: has no function {name}; check the name")
    return function
