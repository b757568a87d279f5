"""`openpalm data blocks`: parquet files with rows of token ids, and a push to the Hub."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from openpalm.base import settings
from openpalm.base.typed import home
from openpalm.cli.data import Prepare, documents_read, lost_text
from openpalm.errors import SettingsError, count_of

if TYPE_CHECKING:
    from openpalm.data.dataset.blocks import BlocksManifest

OF_BLOCKS = ("json", "seq_len", "rest", "dataset_name", "hf_account", "private")
ORIGINAL_TOKENIZER = "EleutherAI/gpt-neox-20b"


@dataclass(frozen=True, kw_only=True)
class Blocks(Prepare):
    inputs: list[str] = field(default_factory=list)
    """as for `data prepare`, or one folder that `data prepare`, `data build` or `data blocks`
    wrote: its tokens are cut into blocks as they are"""
    seq_len: int = 8192
    """tokens in a block, which is a row of a file"""
    seed: int | None = None
    """shuffle the order of the blocks with this seed (and that of --repack-epochs); default: the
    order of the text"""
    rest: Literal["drop", "keep"] = "drop"
    """the tokens at the end of a split that fill no block: drop (counted and printed), or keep as
    a shorter last row"""
    tokenizer: str = ORIGINAL_TOKENIZER
    """byte, bpe:VOCAB (trained on the training text), a tokenizer.json, or the name of a model on
    the Hub. Not used if the input is prepared already"""
    dataset_name: str | None = None
    """dataset on the Hub to read, NAME[:SPLIT]; the same as the input hub:NAME"""
    hf_account: str | None = None
    """dataset repository ACCOUNT/NAME on the Hub: push the blocks to it when they are finished"""
    private: bool = False
    """a repository that --hf-account creates is private"""
    shard: str | None = field(default=None, metadata=settings.NOT_AN_OPTION)


def run_blocks(argv: Sequence[str]) -> None:
    given = settings.parse(
        Blocks,
        argv,
        verb="data blocks",
        about="Tokenizes text, joins the documents with end-of-text tokens and cuts the tokens "
        "into blocks of one length: parquet files with a column `input_ids` that training, "
        "`datasets` and other programs read. The same command resumes after a kill.",
        examples=(
            "openpalm data blocks c4/*.jsonl.gz --tokenizer neox.json --out blocks/c4",
            "openpalm data blocks data/docs --seq-len 2048 --out blocks/docs",
            "openpalm data blocks --dataset-name EleutherAI/the_pile_deduplicated "
            "--hf-account ME/pile-8k --out blocks/pile",
        ),
        positional=("inputs",),
    )
    from openpalm.base.hub import check_repository
    from openpalm.base.progress_bar import long_job
    from openpalm.data.prepare.blocks import BlocksRequest, write_blocks
    from openpalm.data.prepare.preparation import PrepareRequest

    inputs = [home(name) for name in given.inputs]
    inputs += [f"hub:{given.dataset_name}"] if given.dataset_name else []
    if not inputs:
        raise SettingsError("missing INPUTS, or --dataset-name; see `openpalm data blocks --help`")
    if given.hf_account:
        # Before the work, which may take days.
        check_repository(given.hf_account, "--hf-account")
    values = {f.name: getattr(given, f.name) for f in dataclasses.fields(given)}
    values = {name: value for name, value in values.items() if name not in OF_BLOCKS}
    values |= {"inputs": inputs, "tokenizer": home(given.tokenizer), "seed": given.seed or 0}
    request = BlocksRequest(
        prepare=PrepareRequest(**values),
        sequence_length=given.seq_len,
        seed=given.seed,
        rest=given.rest,
    )
    manifest = write_blocks(request, long_job)
    print(manifest.to_json().decode().rstrip() if given.json else _written(given.out, manifest))
    if given.hf_account:
        from openpalm.cli.data_push import push

        push(given.out, given.hf_account, private=given.private)


def _written(out: Path, manifest: "BlocksManifest") -> str:
    length, lines = manifest.sequence_length, documents_read(out, manifest)
    for name, split in manifest.splits.items():
        dropped, kept = manifest.rest[name], split.tokens % length
        rest = f"; a last row of {count_of(kept, 'token')}" if kept else ""
        rest = f"; {count_of(dropped, 'token')} at the end fill none, dropped" if dropped else rest
        lines.append(f"{name:<6}{split.tokens // length:>10,} blocks of {length:,} tokens{rest}")
        lines += lost_text(name, split.lost, split.bytes)
    lines.append(f"vocabulary {manifest.vocab_size:,}, order of the blocks: {manifest.order}")
    lines.append(f"next: openpalm train --model palm-tiny --data {out} --out runs/NAME")
    return "\n".join(lines)
