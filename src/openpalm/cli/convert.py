"""`openpalm convert`: reads and writes checkpoints of other projects."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from openpalm.base.settings import parse
from openpalm.errors import SettingsError

ABOUT = (
    "Converts a checkpoint between OpenPaLM's format and those of other projects. The format of "
    "SRC is detected. One block of a model is in memory at a time. Code in a file is never "
    "executed."
)
EXAMPLES = (
    "openpalm convert palm.pt models/palm",
    "openpalm convert palm.pt models/palm --from palm-rlhf-pytorch --era 0.2.1",
    "openpalm convert step_383500 models/gpt-j --config 6B_roto_256.json --tokenizer gpt2",
    "openpalm convert models/gpt-j exported --to huggingface --dtype bfloat16",
    "openpalm convert models/gpt-j mesh --to mesh-transformer-jax --shards 8",
)


@dataclass(frozen=True)
class ConvertSettings:
    src: Path
    """a checkpoint file of palm-rlhf-pytorch, PaLM-pytorch or nanoPALM (.pt, .pth, .bin,
    .safetensors), or a folder with one; a model directory or step_N folder of mesh-transformer-jax;
    a Hugging Face folder of GPT-J; an OpenPaLM run or checkpoint"""
    dst: Path
    """output directory; must be new or empty"""
    from_: (
        Literal[
            "openpalm",
            "mesh-transformer-jax",
            "huggingface",
            "palm-rlhf-pytorch",
            "palm-pytorch",
            "nanopalm",
        ]
        | None
    ) = None
    """project that wrote SRC; default: detected"""
    to: Literal["openpalm", "mesh-transformer-jax", "huggingface", "palm-rlhf-pytorch"] = "openpalm"
    """output format; palm-rlhf-pytorch is that of its newest version: config.json and palm.pt, or
    reward.pt for a reward model"""
    shards: int | None = None
    """shards of mesh-transformer-jax (its cores_per_replica), which must divide heads, model
    dimension and vocabulary; default: 8"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """data type of the written weights; default: that of SRC"""
    tokenizer: str | None = None
    """tokenizer to write with the model: a tokenizer.json, a folder or a name on the Hugging Face
    Hub, such as gpt2 for GPT-J; default: that of SRC, if it has one"""
    era: str | None = None
    """version of palm-rlhf-pytorch that wrote SRC, such as 0.2.1: its versions compute different
    functions from the same tensor names; default: guessed from the weights and printed"""
    config: Path | None = None
    """JSON file of hyperparameters, or the config of mesh-transformer-jax; default: config.json in
    the folder of SRC, else the shapes of the tensors"""

    def __post_init__(self) -> None:
        if self.shards is not None and self.to != "mesh-transformer-jax":
            raise SettingsError(f"--shards {self.shards}: is for --to mesh-transformer-jax")
        if self.shards is not None and not 0 < self.shards <= 1024:
            raise SettingsError(f"--shards {self.shards}: must be in 1..1024")


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
    from openpalm.convert.export import check_output_directory, removed_on_error
    from openpalm.convert.source import open_source, with_tokenizer
    from openpalm.convert.stamps import refuse_changed, stamps
    from openpalm.convert.target import write

    check_output_directory(settings.dst)
    if settings.src.is_dir() and settings.dst.resolve().is_relative_to(settings.src.resolve()):
        raise SettingsError(
            f"{settings.dst}: is inside {settings.src}, which would change while it is read; "
            "choose another place"
        )
    before = stamps(settings.src)
    source = open_source(settings.src, settings.from_, settings.era, settings.config)
    if source.format == settings.to == "openpalm" and not (settings.dtype or settings.tokenizer):
        raise SettingsError(
            f"{settings.src}: is an OpenPaLM checkpoint already; give --to another format, or "
            "--dtype for a smaller copy, or --tokenizer"
        )
    if settings.tokenizer is not None:
        source = with_tokenizer(source, settings.tokenizer)
    say(f"read {settings.src}: {source.found}")
    for note in source.notes:
        say(f"  {note}")
    written = write(source, settings.dst, settings.to, dtype=settings.dtype, shards=settings.shards)
    if source.format != "openpalm":  # a run may go on; its checkpoints do not change
        with removed_on_error(settings.dst):
            refuse_changed(settings.src, before)
    say(f"wrote {settings.dst}: {written.what}")
    for note in written.notes:
        say(f"  {note}")
    what = "logits" if source.reward is None else "scores"
    say(f"reloaded: {what} within {written.difference:.1e} of the model that was read")
