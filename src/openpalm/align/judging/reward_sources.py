"""Reward sources, the values of --reward: functions, reward models, rules, exact match.

Each source is written `[WEIGHT*]SOURCE`; the reward is the weighted sum of all sources.

    FILE.py:FUNCTION   the user's function of (prompt, completion, row): texts of the last user turn
                       and of the completion, and the prompt's row of the data; returns a number
    RUN or CHECKPOINT  a reward model of `openpalm reward`, with the policy's tokenizer
    hub:NAME           a sequence classifier for `transformers`: its logit, or with several classes
                       the log-odds of the last class
    rules:FILE@CHECKPOINT  minus the weighted mean probability that the completion breaks a rule of
                       the YAML file, judged by the checkpoint (align/judging/model_judge.py)
    exact              1 where the completion equals the row's `answer`, otherwise 0
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

from openpalm.align.judging.model_judge import (
    LABEL_TOKENS,
    EngineJudge,
    rule_questions,
    rule_reward,
)
from openpalm.align.pairs.examples import PreferenceExample
from openpalm.align.pairs.reward_model import collate
from openpalm.align.rollouts.rollout_batch import Completion, Reward, to_example
from openpalm.base.settings import spell
from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint.manifest import read_manifest
from openpalm.data.rows.constitution import read_constitution
from openpalm.data.rows.messages import Messages
from openpalm.data.rows.readers.prompts import PromptRow
from openpalm.data.text.conversation import Message, stop_ids
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import CheckpointError, RewardError, SettingsError, WorkError
from openpalm.generate.engine import Engine
from openpalm.model.reward import RewardModel

MAX_REWARD = 1e9
"""Largest absolute reward: its square is finite in float32."""


class RewardPrompt(NamedTuple):
    """The prompt that a reward function receives."""

    question: str
    """the last user turn"""
    row: dict[str, Any]
    """the row of the data"""


@dataclass(frozen=True)
class RewardContext:
    """The prompts and the tokenizer that rewards need to read completions."""

    tokenizer: Tokenizer
    prompts: Sequence[RewardPrompt]
    stop_ids: frozenset[int]

    @classmethod
    def from_rows(cls, tokenizer: Tokenizer, rows: Sequence[PromptRow]) -> "RewardContext":
        """Completions refer to the rows by number."""
        prompts = [RewardPrompt(last_user_turn(row.prompt), row.row) for row in rows]
        return cls(tokenizer, prompts, stop_ids(tokenizer))

    def text(self, completion: Completion) -> str:
        """The completion's text without its end marker."""
        return self.tokenizer.decode([i for i in completion.ids if i not in self.stop_ids])


def last_user_turn(prompt: Messages) -> str:
    """Its text, empty where the prompt has none."""
    return next((m.content for m in reversed(prompt) if m.role == "user"), "")


def load_reward(words: Sequence[str], context: RewardContext, option: str = "reward") -> Reward:
    """The weighted sum of the sources. Raises SettingsError or CheckpointError.

    When called, raises WorkError for a sum that is not finite or beyond MAX_REWARD.
    """
    named = [_weight_and_source(word, option) for word in words]
    rewards = [(weight, load_source(source, context, option)) for weight, source in named]

    def total(completions: Sequence[Completion]) -> list[float]:
        columns = [[weight * value for value in reward(completions)] for weight, reward in rewards]
        sums = [sum(values, 0.0) for values in zip(*columns, strict=True)]
        for value, completion in zip(sums, completions, strict=True):
            if not abs(value) <= MAX_REWARD:
                text = context.text(completion)[:60]
                raise WorkError(
                    f"{spell(option)} {', '.join(words)}: the reward of the completion {text!a} is "
                    f"{value:g}; it must be a number from -{MAX_REWARD:g} to {MAX_REWARD:g}"
                )
        return sums

    return total


def fingerprint(words: Sequence[str], option: str = "reward") -> str:
    """Hash of the files behind the sources, because a file can change under the same name.

    It covers the text of FILE.py (not of its imports) and the manifest hash of a checkpoint.
    """
    digest = hashlib.sha256()
    for word in words:
        _, source = _weight_and_source(word, option)
        path, colon, _ = source.rpartition(":")
        rules, _, judge = source.removeprefix("rules:").partition("@")
        if colon and path.endswith(".py"):
            digest.update(Path(path).read_bytes())
        elif source.startswith("rules:"):
            digest.update(Path(rules).read_bytes() + _manifest_hash(judge))
        elif Path(source).exists():
            digest.update(_manifest_hash(source))
        digest.update(b"\0")
    return digest.hexdigest()


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
            f"{spell(option)} {word}: {before!r} is no weight; write a number, as in 0.5*SOURCE"
        )
    return weight, source.strip()


def load_source(word: str, context: RewardContext, option: str = "reward") -> Reward:
    """The reward of one source. Raises SettingsError or CheckpointError, naming it."""
    path, colon, name = word.rpartition(":")
    if word == "exact":
        return lambda completions: [exact_match(context, each) for each in completions]
    if colon and path.endswith(".py"):
        return function_reward(_import_function(Path(path), name, option), word, context, option)
    if word.startswith("rules:"):
        return rules_reward(word, context, option)
    if word.startswith("hub:"):
        return classifier_reward(word.removeprefix("hub:"), context, option)
    if Path(word).exists():
        return reward_model_reward(Path(word), context, option)
    raise SettingsError(
        f"{spell(option)} {word}: no such run; give the run of a reward model, FILE.py:FUNCTION, "
        "hub:NAME, rules:FILE@CHECKPOINT or exact"
    )


def exact_match(context: RewardContext, completion: Completion) -> float:
    """1 where the text equals the row's `answer` but for white space around it, otherwise 0."""
    wanted = context.prompts[completion.prompt].row.get("answer")
    return float(wanted is not None and context.text(completion).strip() == str(wanted).strip())


def function_reward(
    function: Callable[[str, str, dict[str, Any]], Any],
    name: str,
    context: RewardContext,
    option: str = "reward",
) -> Reward:
    """The reward of a function of (prompt, completion, row).

    Each call gets its own copy of the row. When called, raises WorkError where the function raises,
    exits, or returns no finite number.
    """

    def reward_of(completion: Completion) -> float:
        prompt, text = context.prompts[completion.prompt], context.text(completion)
        try:
            value = function(prompt.question, text, copy.deepcopy(prompt.row))
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
            f"{spell(option)} {name}: {what} for the completion {text[:60]!a}; correct the "
            "function and run the command again: the run continues"
        )

    return lambda completions: [reward_of(completion) for completion in completions]


def reward_model_reward(
    path: Path, context: RewardContext, option: str = "reward", rows: int = 32
) -> Reward:
    """The reward of a reward model. Raises CheckpointError for another model or tokenizer."""
    directory = checkpoint.resolve(path)
    model = checkpoint.load(directory)
    if not isinstance(model, RewardModel):
        raise CheckpointError(
            f"{spell(option)} {directory}: is no reward model; train one with `openpalm reward`"
        )
    text = checkpoint.tokenizer_json(directory)
    if text is not None and (
        Tokenizer.load(directory / "tokenizer.json").digest != context.tokenizer.digest
    ):
        raise CheckpointError(
            f"{spell(option)} {directory}: its tokenizer is not the policy's; train the reward "
            "model from a checkpoint with the policy's tokenizer"
        )
    model.requires_grad_(False)

    @torch.no_grad()
    def reward(completions: Sequence[Completion]) -> list[float]:
        values: list[float] = []
        for start in range(0, len(completions), rows):
            group = completions[start : start + rows]
            batch = collate([PreferenceExample((to_example(completion),)) for completion in group])
            values += model.value(batch.ids, batch.mask, batch.prompt_lengths).tolist()
        return values

    return reward


def rules_reward(word: str, context: RewardContext, option: str = "reward") -> Reward:
    """The reward of `rules:FILE@CHECKPOINT`. Raises DataError for a bad file.

    When called, raises WorkError for a completion that is too long for the judge.
    """
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

    def reward(completions: Sequence[Completion]) -> list[float]:
        questions = [
            question
            for completion in completions
            for question in rule_questions(
                (Message("user", context.prompts[completion.prompt].question),),
                context.text(completion),
                rules,
            )
        ]
        if not all(judge.fits(question.text, LABEL_TOKENS) for question in questions):
            raise WorkError(
                f"{spell(option)} {word}: a completion with its prompt and rule is longer than "
                "the checkpoint's context; lower --max-new-tokens, or use another checkpoint"
            )
        # A completion needs a number, so even an unlikely yes or no counts.
        broken = [share for share, _ in judge.label_probabilities(questions)]
        each = len(rules.articles)
        groups = [broken[start : start + each] for start in range(0, len(broken), each)]
        return [rule_reward(group, rules) for group in groups]

    return reward


def classifier_reward(name: str, context: RewardContext, option: str = "reward") -> Reward:
    """The reward of a sequence classifier on the hub or in a folder.

    Reads safetensors only and runs no code of the repository. Raises SettingsError where there is
    no classifier.
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
    def reward(completions: Sequence[Completion]) -> list[float]:
        texts = [context.text(completion) for completion in completions]
        batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True)
        logits = model(**batch).logits.float()
        if logits.shape[-1] == 1:
            return logits[:, 0].tolist()
        log_p = logits.log_softmax(dim=-1)
        others = log_p[:, :-1].logsumexp(dim=-1)
        return (log_p[:, -1] - others).tolist()

    return reward


def _import_function(path: Path, name: str, option: str) -> Callable[..., Any]:
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
