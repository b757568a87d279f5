"""`openpalm data prepare`: scans, splits, encodes and writes a dataset, resuming after a kill.

One mechanism for threads, jobs and kills: the inputs alone decide where segments begin; segments
are encoded in parallel and written in order.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

from openpalm.base.workers import working
from openpalm.data.corpus.cleaning import Cleaning, Detokenize, FixText
from openpalm.data.corpus.line_streams import readable
from openpalm.data.corpus.sources import HUB_PREFIX, Source, find_sources
from openpalm.data.dataset import manifest as manifest_file
from openpalm.data.dataset.manifest import (
    InputEntry,
    Manifest,
    PrepareSettings,
    SplitEntry,
    without_defaults,
)
from openpalm.data.prepare.encoding import Encoder
from openpalm.data.prepare.progress_file import (
    OUR_NAMES,
    PARTIAL,
    UnfinishedDataset,
    WritePosition,
    claim_folder,
    remove_scratch,
)
from openpalm.data.prepare.repack import base_name, repack
from openpalm.data.prepare.scan import MEASURES, hash_source, input_entries, scan
from openpalm.data.prepare.segments import JobShare, Segments, read_excerpts
from openpalm.data.prepare.split import Split, assign_splits
from openpalm.data.prepare.writing import SplitWriter
from openpalm.data.text.tokenizer import Tokenizer, bpe_size, is_bpe
from openpalm.errors import DataError, count_of

TOKENIZER = "tokenizer.json"
# More text makes a vocabulary no better, and training it holds all distinct words in memory.
BPE_BYTES = 128 << 20
MAX_EPOCHS = 1000
MAX_SEQUENCE = 1 << 20

Progress = Callable[[int, int], None]
M = TypeVar("M", bound=Manifest)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareRequest:
    """The inputs, the settings and the folder of a dataset. DataError for a value out of range.

    workers: number of threads, None for all cores; shard: I/N, one job's part of N; end_of_text:
    the token that ends a document, for a tokenizer that does not name it; sequence_tokens: length
    of the sequences that min_unique_tokens counts in.
    """

    inputs: Sequence[str]
    out: Path
    tokenizer: str
    text_field: str = "text"
    val_fraction: float = 0.05
    val: str = "hash"
    dedup: str = "exact"
    shard_tokens: int = 1 << 28
    workers: int | None = None
    shard: str | None = None
    end_of_text: str | None = None
    split_text: str | None = None
    fix_text: FixText = "none"
    detokenize: Detokenize = "none"
    min_unique_tokens: int = 0
    sequence_tokens: int = 2048
    repack_epochs: int = 1
    keep_order: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise DataError(f"--val-fraction {self.val_fraction}: must be between 0 and 1")
        if self.val != "hash":
            tail_fraction(self.val)
        if self.dedup not in ("exact", "none"):
            raise DataError(f"--dedup {self.dedup}: must be exact or none")
        if self.shard_tokens < 1:
            raise DataError(f"shard_tokens {self.shard_tokens}: must be at least 1")
        if self.workers is not None and self.workers < 1:
            raise DataError(f"--workers {self.workers}: must be at least 1")
        if self.shard:
            parse_shard(self.shard)
        if is_bpe(self.tokenizer):
            bpe_size(self.tokenizer)
        if not 1 <= self.repack_epochs <= MAX_EPOCHS:
            raise DataError(f"--repack-epochs {self.repack_epochs}: must be 1 to {MAX_EPOCHS}")
        if not 2 <= self.sequence_tokens <= MAX_SEQUENCE:
            raise DataError(
                f"--sequence-tokens {self.sequence_tokens}: must be 2 to {MAX_SEQUENCE}"
            )
        if not 0 <= self.min_unique_tokens <= self.sequence_tokens:
            raise DataError(
                f"--min-unique-tokens {self.min_unique_tokens}: must be 0 to --sequence-tokens "
                f"({self.sequence_tokens})"
            )
        if not 0 <= self.seed < 1 << 63:
            raise DataError(f"--seed {self.seed}: must be 0 or more")
        self.cleaning.fixer  # noqa: B018 - a missing library is an error of the request

    @property
    def cleaning(self) -> Cleaning:
        return Cleaning(self.split_text, self.fix_text, self.detokenize)

    @property
    def settings(self) -> PrepareSettings:
        """The settings as they are in the manifest: those without effect have their default."""
        names = PrepareSettings.__dataclass_fields__
        values = {name: getattr(self, name) for name in names}
        values["split_text"] = self.split_text or ""
        values["fix_text"] = self.cleaning.fixer
        if not self.min_unique_tokens:
            values["sequence_tokens"] = 0
        if self.repack_epochs == 1:
            values["keep_order"] = False
        if self.repack_epochs == 1 or self.keep_order:
            values["seed"] = 0
        return PrepareSettings(**values)


def tail_fraction(val: str) -> float | None:
    """F of `tail:F`; None for `hash`. Raises DataError otherwise."""
    if val == "hash":
        return None
    found = re.fullmatch(r"tail:(0?\.\d+)", val)
    if not found or not float(found[1]):
        raise DataError(f"--val {val}: must be hash or tail:F with F between 0 and 1 (tail:0.1)")
    return float(found[1])


def prepare(request: PrepareRequest, progress: Progress | None = None) -> Manifest:
    """Writes `request.inputs` as a dataset to `request.out`, in bounded memory.

    All inputs are validated before any token is written. A BPE vocabulary is trained on training
    text only. The same request resumes work that a kill or a full disk interrupted, and leaves a
    finished dataset as it is (`manifest.unchanged`). With `request.shard` one job's part is
    written, for `openpalm.data.prepare.parts.build` to join. `progress` gets (bytes done, bytes in
    total). Raises DataError for inputs or a folder that cannot be used, StorageError for the disk.
    """
    given = _given_tokenizer(request)
    left_out: Counter[str] = Counter()
    sources = find_sources(
        request.inputs, left_out, text_field=request.text_field, cleaning=request.cleaning
    )
    existing = _existing_dataset(request)
    refuse_own_output(sources, request.out)
    if existing:
        found = unchanged(request, existing, progress)
        remove_scratch(request.out)
        return found
    # Passes over the inputs: scan, encode; scan, train the vocabulary, encode.
    total = _Total(sources, 2 if given else 3, progress)
    with claim_folder(request.out, _description(request, sources, given)) as unfinished:
        work = _Preparation(request, sources, unfinished, total.advance)
        manifest = work.run(given)
        if request.shard:
            unfinished.commit(manifest_file.PART_NAME, manifest.to_part(request.shard))
        else:
            refuse_unusable(manifest)
            unfinished.commit(manifest_file.NAME, manifest.to_json())
    return replace(manifest, left_out=dict(+left_out))


def unchanged(request: PrepareRequest, existing: M, progress: Progress | None = None) -> M:
    """`existing`, if it is what the request would write; hashes the inputs.

    Raises DataError that names the differing inputs and settings.
    """
    left_out: Counter[str] = Counter()
    sources = find_sources(request.inputs, left_out, text_field=request.text_field)
    total = _Total(sources, 1, progress)
    scanned = [hash_source(source, total.advance) for source in sources]
    inputs = input_entries(sources, scanned)
    _refuse_other_dataset(existing, request, inputs, _given_tokenizer(request))
    return replace(existing, unchanged=True, left_out=dict(+left_out))


def parse_shard(shard: str) -> tuple[int, int]:
    """(I, N) of "I/N", jobs counted from 1. Raises DataError otherwise."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", shard)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise DataError(f"--shard {shard}: must be I/N with I from 1 to N, such as 1/4")
    return int(found[1]), int(found[2])


def _given_tokenizer(request: PrepareRequest) -> Tokenizer | None:
    """The tokenizer, unless it is trained here. Raises DataError where it has no end marker."""
    if is_bpe(request.tokenizer):
        if request.end_of_text:
            # Our own vocabularies have a fixed marker: this refuses any other.
            Tokenizer.from_spec("byte", (), request.end_of_text)
        return None
    given = Tokenizer.from_spec(request.tokenizer, (), request.end_of_text)
    if given.end_of_text is None:
        special = ", ".join(given.special_tokens[:20]) or "none"
        raise DataError(
            f"--tokenizer {request.tokenizer}: it is not known which of its tokens ends a text, "
            "so documents cannot be separated; name it with --end-of-text TOKEN (special tokens: "
            f"{special}; one that is not there is added)"
        )
    return given


def refuse_unusable(manifest: Manifest) -> None:
    """Raises DataError where a split has too few tokens, or its text is mostly lost."""
    for split, entry in manifest.splits.items():
        if entry.lost > entry.bytes:
            raise DataError(
                f"--tokenizer {manifest.settings.tokenizer}: cannot spell {entry.lost:,} of "
                f"{entry.lost + entry.bytes:,} bytes of the {split} split; use byte, bpe:VOCAB or "
                "a tokenizer.json for such text"
            )
        if entry.tokens < 2 and entry.dropped:
            raise DataError(
                f"--min-unique-tokens {manifest.settings.min_unique_tokens}: drops all sequences "
                f"of the {split} split ({entry.dropped:,}); lower it"
            )
        if entry.tokens < 2:
            raise DataError(
                f"too little text: {count_of(entry.tokens, 'token')} for the {split} split, at "
                "least 2 are needed; give more text or another --val-fraction"
            )


class _Total:
    """Reports the progress of all passes over the inputs together."""

    def __init__(self, sources: Sequence[Source], passes: int, progress: Callable | None):
        self._progress, self._done = progress, 0
        self._total = passes * sum(_size(source) for source in sources) if progress else 0

    def advance(self, count: int) -> None:
        self._done += count
        if self._progress:
            self._progress(min(self._done, self._total), self._total)


@dataclass(frozen=True, slots=True)
class _Preparation:
    request: PrepareRequest
    sources: Sequence[Source]
    unfinished: UnfinishedDataset
    advance: Callable[[int], None]

    def run(self, given: Tokenizer | None) -> Manifest:
        request, folder = self.request, self.unfinished.folder
        lengths = given.byte_lengths() if given else None
        with working(request.workers) as workers:
            scanned = scan(
                self.sources,
                self.unfinished,
                workers,
                lengths=lengths,
                advance=self.advance,
            )
        inputs = input_entries(self.sources, scanned)
        own = [source.split for source in self.sources if source.split]
        split = Split(request.val_fraction, tail_fraction(request.val), own)
        names = ", ".join(entry.given for entry in inputs)
        dedup = request.dedup == "exact"
        assignment = assign_splits(folder, folder / MEASURES, split, dedup=dedup, given=names)
        segments = Segments(
            sources=self.sources,
            scanned=scanned,
            assignment=assignment,
            folder=folder,
            in_pieces=given is None or given.in_pieces,
            lengths=lengths,
            end_of_text=given.end_of_text if given else None,
            advance=self.advance,
        )
        tokenizer = given or self._trained_tokenizer(segments)
        tokenizer.save(folder / TOKENIZER)
        dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        return Manifest(
            format=manifest_file.FORMAT,
            version=manifest_file.VERSION,
            dtype=dtype,
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.digest,
            split_by=assignment.split_by,
            settings=request.settings,
            inputs=inputs,
            documents=assignment.counts,
            splits=self._splits(segments, tokenizer, dtype),
        )

    def _splits(
        self, segments: Segments, tokenizer: Tokenizer, dtype: str
    ) -> dict[str, SplitEntry]:
        settings = self.request.settings
        encoded = self._write(segments, Encoder(tokenizer, dtype, segments.lengths))
        if not settings.repacks or self.request.shard:
            return encoded
        self.unfinished.note(WritePosition(len(self.sources), 0, encoded))
        return repack(self.unfinished, encoded, settings, tokenizer, dtype)

    def _trained_tokenizer(self, segments: Segments) -> Tokenizer:
        """Trains a BPE vocabulary on the training text, or on an even sample of a long one."""
        file = self.unfinished.folder / TOKENIZER
        if self.unfinished.progress.tokenizer:
            known = Tokenizer.load(file)
            if known.digest == self.unfinished.progress.tokenizer:
                return known
        size = segments.assignment.bytes
        # Every job trains on the whole text, so that all jobs get the same vocabulary.
        step = -(-size // BPE_BYTES)
        sample = islice(segments.read(JobShare(0, 1, size)), 0, None, step)
        excerpts = (excerpt for one in sample for excerpt in read_excerpts(one, None))
        texts = (excerpt.document.text for excerpt in excerpts if excerpt.split == "train")
        tokenizer = Tokenizer.from_spec(self.request.tokenizer, texts)
        tokenizer.save(file)
        with file.open("r+b") as saved:
            self.unfinished.note_tokenizer(tokenizer.digest)
            self.unfinished.checkpoint(saved)
        return tokenizer

    def _write(self, segments: Segments, encoder: Encoder) -> dict[str, SplitEntry]:
        settings, shard = self.request.settings, self.request.shard
        index, count = parse_shard(shard or "1/1")
        share = JobShare(index - 1, count, segments.assignment.bytes)
        done = self.unfinished.progress.written or WritePosition(0, 0, {})
        with ExitStack() as stack:
            writers = {
                split: stack.enter_context(
                    SplitWriter(
                        self.unfinished.folder,
                        base_name(split, settings, shard),
                        encoder.dtype,
                        self.request.shard_tokens,
                        done.splits.get(split),
                    )
                )
                for split in manifest_file.SPLITS
            }
            workers = stack.enter_context(working(self.request.workers))
            begin = (done.source, done.segment)
            # map returns results in the order of the segments, whichever thread was quicker.
            for source, number, encoded in workers.map(encoder, segments.read(share, begin)):
                for split, tokens in encoded.items():
                    writers[split].extend(*tokens)
                if self.unfinished.is_due():
                    entries = {split: writer.entry() for split, writer in writers.items()}
                    self.unfinished.note(WritePosition(source, number + 1, entries))
                    files = [file for writer in writers.values() for file in writer.files]
                    self.unfinished.checkpoint(*files)
            return {split: writer.close() for split, writer in writers.items()}


def _description(
    request: PrepareRequest, sources: Sequence[Source], given: Tokenizer | None
) -> dict[str, str]:
    """Everything that must be equal for a request to resume unfinished work."""
    listing = "\n".join(f"{source.given}\0{source.path}" for source in sources)
    return {
        "inputs": hashlib.sha256(os.fsencode(listing)).hexdigest(),
        **{name: str(value) for name, value in without_defaults(request.settings).items()},
        "tokenizer": given.digest if given else request.tokenizer,
        "shard": request.shard or "",
        "version": str(manifest_file.VERSION),
    }


def _size(source: Source) -> int:
    if source.path is not None:
        with readable(source.path):
            return source.path.stat().st_size
    if source.given.startswith(HUB_PREFIX):
        return 0
    return hash_source(source, lambda count: None).bytes


def refuse_own_output(sources: Sequence[Source], out: Path) -> None:
    """Raises DataError where a source is inside the output folder."""
    folder = out.resolve()
    for source in sources:
        if source.path and folder in source.path.resolve().parents:
            raise DataError(f"{source.path}: is inside --out {out}; choose another --out")


def _existing_dataset(request: PrepareRequest) -> Manifest | None:
    """The finished dataset in `out`, if any. Raises DataError for files that are not ours."""
    out = request.out
    file = next((path for path in (out, *out.parents) if path.is_file()), None)
    if file:
        raise DataError(f"--out {out}: {file} is a file; name a folder")
    if not out.exists():
        return None
    names = {entry.name for entry in out.iterdir()}
    if manifest_file.NAME in names and not request.shard:
        return manifest_file.read_manifest(out)
    if manifest_file.PART_NAME in names and request.shard:
        shard, manifest = manifest_file.read_part(out)
        if shard == request.shard:
            return manifest
        raise DataError(f"--out {out}: holds part {shard}; choose another --out")
    foreign = sorted(name for name in names if not OUR_NAMES.fullmatch(name))
    # Without the progress file nothing says that we wrote a tokenizer.json.
    if foreign or (names and PARTIAL not in names):
        odd = (foreign or sorted(names))[0]
        raise DataError(f"--out {out}: holds {odd}, which is not ours; choose a new folder")
    return None


def _refuse_other_dataset(
    existing: Manifest,
    request: PrepareRequest,
    inputs: Sequence[InputEntry],
    given: Tokenizer | None,
) -> None:
    settings = request.settings
    if given:
        # Compared by content: the same vocabulary may be given under another path.
        same = given.digest == existing.tokenizer
        name = existing.settings.tokenizer if same else given.digest
        settings = replace(settings, tokenizer=name)
    names = PrepareSettings.__dataclass_fields__
    differing = [n for n in names if getattr(settings, n) != getattr(existing.settings, n)]
    before, now = ([(e.bytes, e.sha256) for e in entries] for entries in (existing.inputs, inputs))
    if before != now:
        differing.insert(0, "inputs")
    if differing:
        raise DataError(
            f"--out {request.out}: already holds another dataset (other "
            f"{', '.join(differing)}); choose another --out, or remove it first"
        )
