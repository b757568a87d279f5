"""`openpalm judge`: answers and written principles in, preference records of a model out."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from openpalm.base.settings import parse
from openpalm.errors import SettingsError

if TYPE_CHECKING:
    from openpalm.align.judging.judge import Judge
    from openpalm.align.judging.judgements import Item

KEY = "OPENPALM_JUDGE_KEY"


@dataclass(frozen=True)
class JudgeSettings:
    """Whose answers are judged, by whom, and by what principles."""

    data: Path
    """a .jsonl of prompt and responses, or preference records; with --model of prompts"""
    constitution: Path
    """YAML: principles, each a text or a text and its weight"""
    out: Path
    """a .jsonl of preference records; what is in it is not judged again"""
    judge: str | None = None
    """run, checkpoint or hub name that judges"""
    endpoint: str | None = None
    """instead of --judge: URL of an OpenAI-compatible server, up to /v1"""
    judge_model: str | None = None
    """which of that server's models; the key is read from OPENPALM_JUDGE_KEY"""
    model: str | None = None
    """run, checkpoint or hub name that writes the answers, where --data has prompts alone"""
    answers: int = 2
    """answers to each prompt, of --model"""
    temperature: float = 1.0
    """of --model's answers"""
    seed: int = 0
    """of --model's answers"""
    max_new_tokens: int = 64
    """tokens of an answer, and of a revision, at most"""
    revise: bool = False
    """write each prompt's first answer better, as edits, instead of comparing answers"""
    parallel: int = 4
    """requests to the endpoint at a time"""
    timeout: float = 60.0
    """seconds that the endpoint may take for a whole reply"""
    device: str = "auto"
    """auto, cpu or cuda"""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """of weights and arithmetic"""
    json: bool = False
    """print the figures as JSON"""

    def __post_init__(self) -> None:
        if (self.judge is None) == (self.endpoint is None):
            raise SettingsError("who judges? give --judge or --endpoint, one of them")
        if (self.endpoint is None) != (self.judge_model is None):
            raise SettingsError("--endpoint and --judge-model: give both or neither")
        for name in ("answers", "max_new_tokens", "parallel"):
            least = 2 if name == "answers" and not self.revise else 1
            if not least <= getattr(self, name) <= 4096:
                option = name.replace("_", "-")
                raise SettingsError(f"--{option} {getattr(self, name)}: must be {least} to 4096")
        if not 0 < self.temperature <= 100:
            raise SettingsError(f"--temperature {self.temperature}: must be in (0, 100]")
        if not 0 < self.timeout <= 3600:
            raise SettingsError(f"--timeout {self.timeout}: must be above 0, at most 3600")
        if not -(2**63) <= self.seed < 2**63:
            raise SettingsError(f"--seed {self.seed}: must be a 64-bit whole number")
        if self.out == self.data:
            raise SettingsError(f"--out {self.out}: must be another file than --data")


class Form(NamedTuple):
    """In which form a model is loaded."""

    device: str
    dtype: str
    tokenizer: Path | None = None
    adapter: Path | None = None
    quantize: Literal["int8", "int4"] | None = None
    verify: bool = False
    force: bool = False


def run(argv: Sequence[str]) -> None:
    settings = parse(
        JudgeSettings,
        argv,
        verb="judge",
        about="Compares answers by the principles of a constitution, every two of a prompt in both "
        "orders, and writes preference records as a person's, for `openpalm dpo` and `openpalm "
        "reward`. The judge is a checkpoint of ours or a model behind an OpenAI-compatible server.",
        examples=[
            "openpalm judge --data answers.jsonl --constitution c.yaml --judge runs/chat "
            "--out j.jsonl",
            "openpalm judge --data prompts.jsonl --model runs/chat --constitution c.yaml "
            "--out k.jsonl \\",
            "    --endpoint http://127.0.0.1:8000/v1 --judge-model chat",
        ],
    )
    told = judged(settings)
    if settings.json:
        print(json.dumps(told))
        return
    what = "revised" if settings.revise else f"compared, {told['ties']} of them ties"
    print(f"{told['written']} {what}; {told['known']} were there before")
    if told["left_out"]:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in told["left_out"].items())
        print(f"left out: {reasons}")
        for refused in told["refused"][:5]:
            print(f"refused: {refused['prompt']!r}: {refused['reason']}")
        if told["left_out"].keys() & {"undecided", "refused by the judge"}:
            print("run the command again to have undecided and refused ones judged again")
    if told["first_place"] is not None:
        print(f"the first place won {told['first_place']:.1%} of the questions (50% is fair)")
    print(settings.out)


def judged(settings: JudgeSettings) -> dict[str, Any]:
    """Appends a record for whatever has none yet; figures of what was done."""
    from openpalm.align.judging.judgements import Session
    from openpalm.base.jsonl import open_jsonl
    from openpalm.cli.common import progress
    from openpalm.data.rows.constitution import read_constitution
    from openpalm.data.rows.preferences import Preference

    constitution = read_constitution(settings.constitution, "principles")
    items, judge = _items(settings), _judge(settings)
    with open_jsonl(settings.out) as file, progress("judge", len(items)) as advance:
        rows = enumerate(file.found, 1)
        known = {Preference.from_json(row, f"--out {settings.out}:{i}").id for i, row in rows}
        session = Session(judge, constitution, settings.max_new_tokens, file, known)
        work = session.revise if settings.revise else session.compare
        for item in items:
            work(item)
            advance(1)
        session.check()
    return session.told()


def _judge(settings: JudgeSettings) -> "Judge":
    from openpalm.align.judging.endpoint import EndpointJudge
    from openpalm.align.judging.judge import EngineJudge
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
    engine, tokenizer = serving_engine(settings.judge, Form(settings.device, settings.dtype))
    return EngineJudge(engine, tokenizer, f"openpalm-{_hash_of(settings.judge)[:16]}")


def _items(settings: JudgeSettings) -> "list[Item]":
    """What is to be judged: the file's answers, or prompts whose answers --model will write."""
    from openpalm.align.judging.judgements import given_items
    from openpalm.cli.common import report_unused
    from openpalm.data.rows.candidate_files import read_candidates

    if settings.model is not None:
        return _answered(settings, settings.model)
    given = read_candidates(settings.data)
    found = report_unused("judge", settings.data, given, "set of answers")
    return given_items(found.items)


def _answered(settings: JudgeSettings, model: str) -> "list[Item]":
    from openpalm.align.judging.best_of_n import Draw
    from openpalm.align.judging.judgements import Writer, drawn_items
    from openpalm.cli.common import serving_engine
    from openpalm.cli.rl_common import fitting
    from openpalm.data.rows.prompt_files import read_prompts

    given = read_prompts(settings.data)
    engine, tokenizer = serving_engine(model, Form(settings.device, settings.dtype))
    rows, ids = fitting(given, tokenizer, settings, engine.model.config.context, "judge")
    draw = Draw(settings.answers, settings.max_new_tokens, settings.temperature, settings.seed)
    return drawn_items(Writer(engine, tokenizer, _hash_of(model), draw), rows, ids)


def _hash_of(name: str) -> str:
    from openpalm.checkpoint import directory as checkpoint
    from openpalm.checkpoint.manifest import read_manifest
    from openpalm.cli.common import weights_path

    directory = checkpoint.resolve(weights_path(name))
    return read_manifest(directory)["sha256"]
