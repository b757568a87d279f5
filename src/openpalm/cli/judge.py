"""`openpalm judge`: AI feedback; a model compares completions and writes preference records."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from openpalm.base.settings import check, check_field, parse
from openpalm.cli.model_options import ModelOptions, check_sampling
from openpalm.errors import SettingsError

if TYPE_CHECKING:
    from openpalm.align.judging.judging_session import Item
    from openpalm.align.judging.model_judge import Judge

KEY = "OPENPALM_JUDGE_KEY"


@dataclass(frozen=True)
class JudgeSettings:
    """Completions, judge and constitution of AI feedback."""

    data: Path
    """.jsonl of prompts with responses, or of preference records; with --model, of prompts"""
    constitution: Path
    """YAML file of principles, each a text or a text with a weight"""
    out: Path
    """.jsonl of preference records to write; completions judged in it already are skipped"""
    judge: str | None = None
    """run, checkpoint or hub name of the judge"""
    endpoint: str | None = None
    """instead of --judge: base URL of an OpenAI-compatible API, ending in /v1"""
    judge_model: str | None = None
    """model name at the endpoint; OPENPALM_JUDGE_KEY holds the API key, if it needs one"""
    model: str | None = None
    """run, checkpoint or hub name that generates completions, if --data has prompts only"""
    num_completions: int = 2
    """completions per prompt, sampled from --model"""
    temperature: float = 1.0
    """sampling temperature of --model"""
    seed: int = 0
    """random seed of --model's sampling"""
    max_new_tokens: int = 64
    """maximum tokens per completion and per revision"""
    revise: bool = False
    """revise the first completion of each prompt (records of kind edit) instead of comparing"""
    parallel: int = 4
    """concurrent requests to the endpoint"""
    timeout: float = 60.0
    """seconds until a request to the endpoint times out"""
    device: str = "auto"
    """auto, cpu or cuda; auto is a GPU if there is one"""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """data type of weights and arithmetic"""
    json: bool = False
    """print the counts as JSON"""

    def __post_init__(self) -> None:
        if (self.judge is None) == (self.endpoint is None):
            raise SettingsError("no judge, or two: give either --judge or --endpoint")
        if (self.endpoint is None) != (self.judge_model is None):
            raise SettingsError("--endpoint and --judge-model: give both or neither")
        for name in ("num_completions", "max_new_tokens", "parallel"):
            least = 2 if name == "num_completions" and not self.revise else 1
            value = getattr(self, name)
            check(least <= value <= 4096, name, value, f"{least} to 4096")
        check_field(self, "timeout", lambda v: 0 < v <= 3600, "above 0, at most 3600")
        check_sampling(self)
        if self.out == self.data:
            raise SettingsError(f"--out {self.out}: must be another file than --data")


def run(argv: Sequence[str]) -> None:
    settings = parse(
        JudgeSettings,
        argv,
        verb="judge",
        about="AI feedback: a judge compares every two completions of a prompt by the principles "
        "of a constitution, in both orders. Writes preference records for `openpalm dpo` and "
        "`openpalm reward`. The judge is an OpenPaLM checkpoint or a model behind an "
        "OpenAI-compatible API.",
        examples=[
            "openpalm judge --data answers.jsonl --constitution c.yaml --judge runs/chat "
            "--out j.jsonl",
            "openpalm judge --data prompts.jsonl --model runs/chat --constitution c.yaml "
            "--out k.jsonl \\",
            "    --endpoint http://127.0.0.1:8000/v1 --judge-model chat",
        ],
    )
    counts = judge_completions(settings)
    if settings.json:
        print(json.dumps(counts))
        return
    done = "revised" if settings.revise else f"compared, {counts['ties']} of them ties"
    print(f"{counts['written']} {done}; {counts['known']} judged before")
    if counts["left_out"]:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in counts["left_out"].items())
        print(f"left out: {reasons}")
        for refused in counts["refused"][:5]:
            print(f"refused: {refused['prompt']!r}: {refused['reason']}")
        if counts["left_out"].keys() & {"undecided", "refused by the judge"}:
            print("run the command again to ask about undecided and refused ones again")
    if counts["first_place"] is not None:
        print(
            f"position bias: the first completion shown won {counts['first_place']:.1%} of the "
            "questions (50% is unbiased)"
        )
    print(settings.out)


def judge_completions(settings: JudgeSettings) -> dict[str, Any]:
    """Appends a preference record for every item without one; returns the session's counts."""
    from openpalm.align.judging.judging_session import JudgingSession
    from openpalm.base.jsonl import open_jsonl
    from openpalm.base.progress_bar import ProgressBar
    from openpalm.data.rows.constitution import read_constitution
    from openpalm.data.rows.preferences import Preference

    constitution = read_constitution(settings.constitution, "principles")
    items, judge = _items(settings), _judge(settings)
    with open_jsonl(settings.out) as file, ProgressBar("judge", len(items)) as bar:
        rows = enumerate(file.found, 1)
        known = {Preference.from_json(row, f"--out {settings.out}:{i}").id for i, row in rows}
        session = JudgingSession(judge, constitution, settings.max_new_tokens, file, known)
        ask = session.revise if settings.revise else session.compare
        for item in items:
            ask(item)
            bar.advance(1)
        session.check()
    return session.summary()


def _judge(settings: JudgeSettings) -> "Judge":
    from openpalm.align.judging.endpoint_judge import EndpointJudge
    from openpalm.align.judging.model_judge import EngineJudge
    from openpalm.cli.common import serving_engine

    if settings.endpoint is not None and settings.judge_model is not None:
        return EndpointJudge(
            settings.endpoint,
            settings.judge_model,
            os.environ.get(KEY) or None,
            timeout_s=settings.timeout,
            parallel=settings.parallel,
        )
    assert settings.judge is not None
    engine, tokenizer = serving_engine(
        settings.judge, ModelOptions(device=settings.device, dtype=settings.dtype)
    )
    return EngineJudge(engine, tokenizer, f"openpalm-{_hash_of(settings.judge)[:16]}")


def _items(settings: JudgeSettings) -> "list[Item]":
    """The completions of --data, or with --model its prompts, to be sampled later."""
    from openpalm.align.judging.judging_session import items_from_rows
    from openpalm.cli.common import report_unused
    from openpalm.data.rows.readers.candidates import read_candidates

    if settings.model is not None:
        return _sampled_items(settings, settings.model)
    given = read_candidates(settings.data)
    found = report_unused("judge", settings.data, given, "set of completions")
    return items_from_rows(found.items)


def _sampled_items(settings: JudgeSettings, model: str) -> "list[Item]":
    from openpalm.align.judging.best_of_n import SamplingPlan
    from openpalm.align.judging.judging_session import Writer, items_from_model
    from openpalm.cli.common import serving_engine
    from openpalm.cli.rl_common import usable_prompts
    from openpalm.data.rows.readers.prompts import read_prompts

    given = read_prompts(settings.data)
    engine, tokenizer = serving_engine(
        model, ModelOptions(device=settings.device, dtype=settings.dtype)
    )
    rows, ids = usable_prompts(given, tokenizer, settings, engine.model.config.context, "judge")
    plan = SamplingPlan(
        settings.num_completions, settings.max_new_tokens, settings.temperature, settings.seed
    )
    return items_from_model(Writer(engine, tokenizer, _hash_of(model), plan), rows, ids)


def _hash_of(name: str) -> str:
    from openpalm.checkpoint import directory as checkpoint
    from openpalm.checkpoint.manifest import read_manifest
    from openpalm.cli.common import weights_path

    directory = checkpoint.resolve(weights_path(name))
    return read_manifest(directory)["sha256"]
