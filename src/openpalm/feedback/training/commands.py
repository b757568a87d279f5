"""The command lines of trainings: `openpalm reward|dpo|ppo|sft`, with the options that are safe.

A manager of a project may set numbers of a training. Options that name files or code are chosen
here, never taken from a form.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openpalm.base import jsonl
from openpalm.base.files import sha256_of
from openpalm.base.settings import spell
from openpalm.errors import DataError
from openpalm.feedback.models import Item, ModelVersion, Project, Prompt, Snapshot, TrainRun

VERBS = ("reward", "dpo", "ppo", "sft")
_OF_ALL = (
    *("steps", "epochs", "minutes", "seed", "sequence_length", "batch_tokens"),
    *("microbatch_tokens", "save_every", "eval_every", "dtype", "optim.lr", "optim.weight_decay"),
    *("lora.rank", "lora.alpha", "last_layers"),
)
_ROLLOUT = (
    *("prompts_per_rollout", "num_completions", "max_new_tokens", "temperature", "kl_coef"),
    *("target_kl", "epochs_per_rollout", "minibatches", "early_stopping.max_kl"),
    *("early_stopping.max_length", "early_stopping.min_entropy"),
)
OPTIONS: dict[str, tuple[str, ...]] = {
    "reward": (*_OF_ALL, "loss", "ensemble_size", "centring_coef", "margin_scale", "axis"),
    "dpo": (*_OF_ALL, "loss", "beta", "label_smoothing", "length_normalise"),
    "ppo": (*_OF_ALL, *_ROLLOUT),
    "sft": (*_OF_ALL, "pack"),
}
OWN_OPTIONS = ("members", "name", "filter", "reward_run")
"""settings of a TrainRun that are no options of the command"""
DEFAULTS: dict[str, dict[str, Any]] = {
    "reward": {"epochs": 2},
    "dpo": {"epochs": 2},
    "ppo": {"steps": 40},
    "sft": {"epochs": 2},
}
LENGTHS = ("steps", "epochs", "minutes")
MAX_MEMBERS = 8
MAX_NAME = 100
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,40}\Z")


def check_settings(verb: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with this verb's defaults. Raises DataError naming a wrong one."""
    if verb not in VERBS:
        raise DataError(f"{verb}: is no training; choose from {', '.join(VERBS)}")
    checked: dict[str, Any] = {}
    for name, value in given.items():
        if name == "name":
            checked |= _name(value)
        elif name in OWN_OPTIONS:
            checked[name] = value
        elif name not in OPTIONS[verb]:
            known = ", ".join(OPTIONS[verb])
            raise DataError(f"{name}: {verb} has no such setting here; it has {known}")
        elif value not in (None, ""):
            checked[name] = _value(name, value)
    members = checked.get("members", 1)
    if type(members) is not int or not 1 <= members <= (MAX_MEMBERS if verb == "reward" else 1):
        raise DataError(f"members {members}: must be 1 to {MAX_MEMBERS}, for a reward model only")
    if sum(name in checked for name in LENGTHS) > 1:
        raise DataError("give one of steps, epochs and minutes")
    has_length = any(name in checked for name in LENGTHS)
    return ({} if has_length else DEFAULTS[verb]) | checked


def _name(value: Any) -> dict[str, str]:
    """The name of the model to be made, unless it is empty. A wrong one would fail at the end."""
    if value in (None, ""):
        return {}
    if not isinstance(value, str) or len(value) > MAX_NAME or not value.isprintable():
        raise DataError(f"name {value!r:.60}: must be a text of one line, at most {MAX_NAME} long")
    return {"name": value}


def _value(name: str, value: Any) -> Any:
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    if name == "seed" and type(value) is not int:
        raise DataError(f"seed {value!r:.60}: must be a whole number")
    if is_number or (isinstance(value, str) and _WORD.match(value)):
        return value
    raise DataError(f"{name} {value!r:.60}: must be a number or a word")


def command_words(run: TrainRun, out: Path, member: int) -> list[str]:
    """The command line of one member. Raises DataError if what it needs is missing."""
    assert run.parent is not None
    words = [run.verb, "--init", run.parent.path, "--data", str(_data(run)), "--out", str(out)]
    options = {k: v for k, v in run.settings.items() if k not in OWN_OPTIONS}
    options["seed"] = int(options.get("seed", 0)) + member
    if run.verb == "ppo":
        options["reward"] = reward_option(run)
    for name, value in sorted(options.items()):  # a database may give them in any order
        words += [spell(name), _spelled(value)]
    return words


def _spelled(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def reward_option(run: TrainRun) -> str:
    """The reward model, or the mean of an ensemble."""
    model = run.reward_model
    if model is None:
        raise DataError("ppo needs a reward model; train one first")
    ensemble = [model]
    if model.run_id:
        ensemble = list(
            ModelVersion.objects.filter(run=model.run_id, kind=model.kind).order_by("id")
        )
    for each in ensemble:
        if re.search(r"[\[\],*@:'\"]", each.path):
            raise DataError(f"{each.path}: a path of a reward model may not have , * : @ or quotes")
    if len(ensemble) == 1:
        return model.path
    weight = 1 / len(ensemble)
    return "[" + ", ".join(f"{weight:.6g}*{each.path}" for each in ensemble) + "]"


def _data(run: TrainRun) -> Path:
    if run.verb == "ppo":
        return prompts_file(run)
    if run.snapshot is None:
        raise DataError(f"{run.verb} needs a snapshot of judgements")
    return _unaltered(run.snapshot)


def _unaltered(snapshot: Snapshot) -> Path:
    """The snapshot's file. What the lineage says would not be true of another one."""
    path = Path(snapshot.path)
    remedy = "restore it from a backup, or start another training"
    try:
        found = sha256_of(path)
    except OSError as error:
        raise DataError(
            f"{path}: the snapshot cannot be read ({error.strerror}); {remedy}"
        ) from None
    if found != snapshot.digest:
        raise DataError(f"{path}: the snapshot was altered after it was frozen; {remedy}")
    return path


def prompts_path(run: TrainRun) -> Path:
    return Path(f"{run.directory}-prompts.jsonl")


def prompts_file(run: TrainRun) -> Path:
    """The prompts of a PPO run, written once: a run that continues needs the same."""
    path = prompts_path(run)
    if not path.exists():
        prompts = training_prompts(run.project).iterator(chunk_size=2000)
        rows = ({"prompt": prompt.messages, "id": prompt.pk} for prompt in prompts)
        if not jsonl.write_rows(path, rows):
            path.unlink()
            raise DataError(
                "the project has no training prompt: all are held out, or there is none"
            )
    return path


def training_prompts(project: Project):
    """Prompts that may be trained on: not held out, and of no gold item."""
    gold = Item.objects.filter(project=project, purpose=Item.Purpose.GOLD)
    found = Prompt.objects.filter(project=project, held_out=False)
    return found.exclude(pk__in=gold.values("prompt")).order_by("id")
