"""openpalm convert: checkpoints of other projects, into our form and back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from openpalm.base.settings import parse, spell
from openpalm.errors import SettingsError

if TYPE_CHECKING:
    from openpalm.convert.detect import ForeignCheckpoint
    from openpalm.model.transformer import Transformer

ABOUT = "Read a checkpoint of another project, or write one of ours for it. Runs nothing in it."
EXAMPLES = (
    "openpalm convert palm.pt models/palm",
    "openpalm convert reward.pt models/reward",
    "openpalm convert palm.pt models/palm --from palm-rlhf-pytorch --era 0.2.1",
    "openpalm convert runs/tiny exported --to palm-rlhf-pytorch",
)


@dataclass(frozen=True)
class ConvertSettings:
    src: Path
    """a foreign checkpoint file (.pt, .pth, .bin, .safetensors) or a folder holding exactly one;
    with --to palm-rlhf-pytorch also a run or checkpoint of ours"""
    dst: Path
    """the directory to make; must not exist, or be empty"""
    from_: Literal["palm-rlhf-pytorch", "palm-pytorch", "nanopalm"] | None = None
    """the project that wrote SRC; told from its keys if not given"""
    to: Literal["openpalm", "palm-rlhf-pytorch"] = "openpalm"
    """the form to write; palm-rlhf-pytorch is its newest form, config.json and palm.pt, or
    reward.pt of a reward model"""
    era: str | None = None
    """the version of palm-rlhf-pytorch that wrote SRC, such as 0.2.1: the same keys compute
    different functions in different versions; guessed, and said, if not given"""
    config: Path | None = None
    """JSON of the hyperparameters; else a config.json beside SRC, else the tensors' shapes"""


def run(argv: Sequence[str]) -> None:
    settings = parse(
        ConvertSettings,
        argv,
        verb="convert",
        about=ABOUT,
        examples=EXAMPLES,
        positional=("src", "dst"),
    )
    convert(settings, print)


def convert(settings: ConvertSettings, say: Callable[[str], None]) -> None:
    """Writes `settings.dst`; `say` gets a line for everything read, assumed and written."""
    from openpalm.convert import export

    export.check_output_directory(settings.dst)
    model, foreign = _read(settings, say)
    if settings.to == "palm-rlhf-pytorch":
        difference, notes = export.save_as_palm_rlhf(model, settings.dst)
        for note in notes:
            say(f"  {note}")
        written = f"{export.weights_file_name(model)} and config.json for palm-rlhf-pytorch"
    else:
        assert foreign is not None
        difference = export.save_as_openpalm(model, settings.dst, lineage=foreign.lineage())
        written = "a checkpoint without a tokenizer"
    say(f"wrote {settings.dst}: {written}")
    what = "scores" if export.weights_file_name(model) == "reward.pt" else "logits"
    say(f"reloaded: {what} within {difference:.1e} of the model that was read")


def _read(
    settings: ConvertSettings, say: Callable[[str], None]
) -> "tuple[Transformer, ForeignCheckpoint | None]":
    """The model of SRC, and what it was if it is not ours."""
    signs = ("manifest.json", "config.json")
    is_checkpoint = all((settings.src / sign).exists() for sign in signs)
    if is_checkpoint or (settings.src / "checkpoints").is_dir():
        from openpalm.checkpoint import directory as checkpoint

        _check_ours(settings)
        say(f"read {settings.src}: an OpenPaLM checkpoint")
        return checkpoint.load(settings.src), None
    from openpalm.convert.detect import read_foreign

    foreign = read_foreign(settings.src, settings.from_, settings.era, settings.config)
    say(f"read {foreign.file} as {foreign.project}, era: {foreign.era} ({foreign.why})")
    for note in foreign.notes:
        say(f"  {note}")
    return foreign.model(), foreign


def _check_ours(settings: ConvertSettings) -> None:
    if settings.to == "openpalm":
        raise SettingsError(
            f"{settings.src}: is OpenPaLM's already; say --to palm-rlhf-pytorch to write it for "
            "that project"
        )
    for option in ("from_", "era", "config"):
        if getattr(settings, option) is not None:
            raise SettingsError(f"{spell(option)}: is about foreign files; {settings.src} is ours")
