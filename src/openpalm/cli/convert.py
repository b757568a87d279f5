"""`openpalm convert`: reads checkpoints of other projects, writes checkpoints for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from openpalm.base.settings import parse, spell
from openpalm.errors import SettingsError

if TYPE_CHECKING:
    from openpalm.convert.detect import ForeignCheckpoint
    from openpalm.model.transformer import Transformer

ABOUT = (
    "Converts a checkpoint of another project to OpenPaLM's format, or an OpenPaLM checkpoint to "
    "palm-rlhf-pytorch's. Code in a file is never executed."
)
EXAMPLES = (
    "openpalm convert palm.pt models/palm",
    "openpalm convert reward.pt models/reward",
    "openpalm convert palm.pt models/palm --from palm-rlhf-pytorch --era 0.2.1",
    "openpalm convert runs/tiny exported --to palm-rlhf-pytorch",
)


@dataclass(frozen=True)
class ConvertSettings:
    src: Path
    """checkpoint file of another project (.pt, .pth, .bin, .safetensors), or a folder with one such
    file; with --to palm-rlhf-pytorch also an OpenPaLM run or checkpoint"""
    dst: Path
    """output directory; must be new or empty"""
    from_: Literal["palm-rlhf-pytorch", "palm-pytorch", "nanopalm"] | None = None
    """project that wrote SRC; default: detected from the tensor names"""
    to: Literal["openpalm", "palm-rlhf-pytorch"] = "openpalm"
    """output format; palm-rlhf-pytorch is that of its newest version: config.json and palm.pt, or
    reward.pt for a reward model"""
    era: str | None = None
    """version of palm-rlhf-pytorch that wrote SRC, such as 0.2.1: its versions compute different
    functions from the same tensor names; default: guessed from the weights and printed"""
    config: Path | None = None
    """JSON file of hyperparameters; default: config.json in the folder of SRC, else the shapes of
    the tensors"""


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
    """Writes `settings.dst`; `say` gets a line for all that was read, assumed or written."""
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
    """The model of SRC, and the foreign checkpoint unless SRC is OpenPaLM's."""
    files = ("manifest.json", "config.json")
    is_checkpoint = all((settings.src / name).exists() for name in files)
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
            f"{settings.src}: is an OpenPaLM checkpoint already; give --to palm-rlhf-pytorch to "
            "write it in that project's format"
        )
    for option in ("from_", "era", "config"):
        if getattr(settings, option) is not None:
            raise SettingsError(
                f"{spell(option)}: is for checkpoints of other projects, but {settings.src} is "
                "OpenPaLM's; leave it out"
            )
