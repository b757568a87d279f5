"""Preparing a dataset: the inputs scanned, split, encoded and written, from wherever it stopped.

One mechanism for workers, jobs and kills: the inputs are cut in segments that depend on nothing
else, segments are encoded side by side and written in order.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

from openpalm.base.workers import working
from openpalm.data.corpus.line_streams import readable
from openpalm.data.corpus.sources import HUB_PREFIX, Source, find_sources
from openpalm.data.dataset import manifest as manifest_file
from openpalm.data.dataset.manifest import InputEntry, Manifest, PrepareSettings, SplitEntry
from openpalm.data.prepare.encoding import Encoder
from openpalm.data.prepare.progress_file import (
    OUR_NAMES,
    PARTIAL,
    Unfinished,
    Written,
    claimed,
    remove_scratch,
)
from openpalm.data.prepare.scan import RECORDS, hashed, input_entries, scan
from openpalm.data.prepare.segments import Segments, Share, parts
from openpalm.data.prepare.split import Split, decide
from openpalm.data.prepare.writing import SplitWriter
from openpalm.data.text.tokenizer import Tokenizer, bpe_size, is_bpe
from openpalm.errors import DataError, count_of

TOKENIZER = "tokenizer.json"
# More training text than this makes a vocabulary no better, and learning holds its words in memory.
BPE_BYTES = 128 << 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareRequest:
    """What to prepare, how, and where to. Raises DataError for a value out of range.

    `workers` is a number of threads, None for all cores; `shard` is I/N, one job's part of N.
    `end_of_text` names the token that ends a document, for a tokenizer that does not tell.
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

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise DataError(f"--val-fraction {self.val_fraction}: must lie between 0 and 1")
        if self.val != "hash":
            tail_fraction(self.val)
        if self.dedup not in ("exact", "none"):
            raise DataError(f"--dedup {self.dedup}: must be exact or none")
        if self.shard_tokens < 1:
            raise DataError(f"shard_tokens {self.shard_tokens}: must be at least 1")
        if self.workers is not None and self.workers < 1:
            raise DataError(f"--workers {self.workers}: must be at least 1")
        if self.shard:
            job_of(self.shard)
        if is_bpe(self.tokenizer):
            bpe_size(self.tokenizer)

    @property
    def settings(self) -> PrepareSettings:
        names = PrepareSettings.__dataclass_fields__
        return PrepareSettings(**{name: getattr(self, name) for name in names})


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

    All inputs are validated before any token is written. A BPE vocabulary is learnt from training
    text only. What a kill or a full disk interrupted goes on; repeating what is done changes
    nothing (`manifest.unchanged`). With `request.shard` only one job's part is written, for
    `openpalm.data.prepare.parts.build` to join. `progress` is given (bytes done, bytes in total).
    Raises DataError for inputs or a folder that cannot be used, StorageError when the disk refuses.
    """
    given = _given_tokenizer(request)
    left_out: Counter[str] = Counter()
    sources = find_sources(request.inputs, left_out, text_field=request.text_field)
    existing = _look_at(request)
    _refuse_own_output(sources, request.out)
    told = _Told(sources, 1 if existing else 2 if given else 3, progress)
    if existing:
        scanned = [hashed(source, told.advance) for source in sources]
        _refuse_another(existing, request, input_entries(sources, scanned), given)
        remove_scratch(request.out)
        return replace(existing, unchanged=True, left_out=dict(+left_out))
    with claimed(request.out, _wanted(request, sources, given)) as unfinished:
        work = _Preparation(request, sources, unfinished, told.advance)
        manifest = work.run(given)
        if request.shard:
            unfinished.commit(manifest_file.PART_NAME, manifest.to_part(request.shard))
        else:
            refuse_unusable(manifest)
            unfinished.commit(manifest_file.NAME, manifest.to_json())
    return replace(manifest, left_out=dict(+left_out))


def job_of(shard: str) -> tuple[int, int]:
    """(I, N) of I/N, jobs counted from 1. Raises DataError otherwise."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", shard)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise DataError(f"--shard {shard}: must be I/N with I from 1 to N, such as 1/4")
    return int(found[1]), int(found[2])


def _given_tokenizer(request: PrepareRequest) -> Tokenizer | None:
    """The tokenizer that is not learnt here; every one must be able to separate documents."""
    if is_bpe(request.tokenizer):
        if request.end_of_text:
            Tokenizer.from_spec("byte", (), request.end_of_text)  # refuses another marker
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
        if entry.tokens < 2:
            raise DataError(
                f"too little text: {count_of(entry.tokens, 'token')} for the {split} split, at "
                "least 2 are needed; give more text or another --val-fraction"
            )


class _Told:
    """How far all passes together are."""

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
    unfinished: Unfinished
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
        split = Split(request.val_fraction, tail_fraction(request.val), _own_splits(self.sources))
        names = ", ".join(entry.given for entry in inputs)
        dedup = request.dedup == "exact"
        plan = decide(folder, folder / RECORDS, split, dedup=dedup, given=names)
        segments = Segments(
            sources=self.sources,
            scanned=scanned,
            plan=plan,
            folder=folder,
            in_pieces=given is None or given.in_pieces,
            lengths=lengths,
            end_of_text=given.end_of_text if given else None,
            advance=self.advance,
        )
        tokenizer = given or self._learnt(segments)
        tokenizer.save(folder / TOKENIZER)
        dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        return Manifest(
            format=manifest_file.FORMAT,
            version=manifest_file.VERSION,
            dtype=dtype,
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.digest,
            split_by=plan.split_by,
            settings=request.settings,
            inputs=inputs,
            documents=plan.counts,
            splits=self._write(segments, Encoder(tokenizer, dtype, lengths)),
        )

    def _learnt(self, segments: Segments) -> Tokenizer:
        """The vocabulary of the training text, evenly sampled where that is long; learnt once."""
        file = self.unfinished.folder / TOKENIZER
        if self.unfinished.done.tokenizer:
            known = Tokenizer.load(file)
            if known.digest == self.unfinished.done.tokenizer:
                return known
        step = -(-segments.plan.bytes // BPE_BYTES)
        chosen = islice(segments.read(Share(0, 1, segments.plan.bytes)), 0, None, step)
        found = (part for one in chosen for part in parts(one, None))
        texts = (part.piece.text for part in found if part.split == "train")
        tokenizer = Tokenizer.from_spec(self.request.tokenizer, texts)
        tokenizer.save(file)
        with file.open("r+b") as saved:
            self.unfinished.note_tokenizer(tokenizer.digest)
            self.unfinished.checkpoint(saved)
        return tokenizer

    def _write(self, segments: Segments, encoder: Encoder) -> dict[str, SplitEntry]:
        index, count = job_of(self.request.shard or "1/1")
        share = Share(index - 1, count, segments.plan.bytes)
        done = self.unfinished.done.written or Written(0, 0, {})
        with ExitStack() as stack:
            writers = {
                split: stack.enter_context(
                    SplitWriter(
                        self.unfinished.folder,
                        split,
                        encoder.dtype,
                        self.request.shard_tokens,
                        done.splits.get(split),
                    )
                )
                for split in manifest_file.SPLITS
            }
            workers = stack.enter_context(working(self.request.workers))
            begin = (done.source, done.segment)
            for source, number, encoded in workers.map(encoder, segments.read(share, begin)):
                for split, found in encoded.items():
                    writers[split].extend(*found)
                if self.unfinished.is_due():
                    entries = {split: writer.entry() for split, writer in writers.items()}
                    self.unfinished.note(Written(source, number + 1, entries))
                    files = [file for writer in writers.values() for file in writer.files]
                    self.unfinished.checkpoint(*files)
            return {split: writer.close() for split, writer in writers.items()}


def _own_splits(sources: Sequence[Source]) -> list[str] | None:
    own = [source.split for source in sources if source.split]
    return own or None


def _wanted(
    request: PrepareRequest, sources: Sequence[Source], given: Tokenizer | None
) -> dict[str, str]:
    """What must be the same for unfinished work to be gone on with."""
    listing = "\n".join(f"{source.given}\0{source.path}" for source in sources)
    return {
        "inputs": hashlib.sha256(os.fsencode(listing)).hexdigest(),
        **{name: str(value) for name, value in asdict(request.settings).items()},
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
    return hashed(source, lambda count: None).bytes


def _refuse_own_output(sources: list[Source], out: Path) -> None:
    folder = out.resolve()
    for source in sources:
        if source.path and folder in source.path.resolve().parents:
            raise DataError(f"{source.path}: lies inside --out {out}; choose another --out")


def _look_at(request: PrepareRequest) -> Manifest | None:
    """What is already in `out`, if it is whole. Raises DataError for anything that is not ours."""
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
    # Without our own mark, even a tokenizer.json is somebody's.
    if foreign or (names and PARTIAL not in names):
        odd = (foreign or sorted(names))[0]
        raise DataError(f"--out {out}: holds {odd}, which is not ours; choose a new folder")
    return None


def _refuse_another(
    existing: Manifest,
    request: PrepareRequest,
    inputs: Sequence[InputEntry],
    given: Tokenizer | None,
) -> None:
    settings = request.settings
    if given:
        # The same vocabulary under any path is the same, another one under the same path is not.
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
