"""Text without near-duplicates to blocks, in parallel, with datatrove (`openpalm[cluster]`).

    python examples/datatrove_blocks.py TEXTS --work DIR --out BLOCKS --tokenizer TOKENIZER.json
        [--seq-len 8192] [--tasks 4]

TEXTS is what `openpalm data prepare` reads: a folder, a pattern, a URL. datatrove's MinHash finds
near-duplicates and keeps one document of each group; then each task tokenizes its part of the kept
documents as `openpalm data prepare --shard I/N` does. The parts joined are byte for byte what one
process writes. A step that is finished is not repeated when the script is run again. On a cluster,
put datatrove's SlurmPipelineExecutor where `run_step` has LocalPipelineExecutor.
"""

import argparse
import json
from pathlib import Path

from datatrove.data import Document, DocumentsPipeline
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer


class Words(WordTokenizer):
    """Words between spaces, for the shingles; datatrove's own for a language need spaCy's data."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]


class ReadTexts(PipelineStep):
    """OpenPaLM's readers; task I of N reads every N-th file."""

    name, type = "OpenPaLM documents", "Reader"

    def __init__(self, texts: str):
        super().__init__()
        self.texts = texts

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        from openpalm.data.corpus.document_reader import read_documents
        from openpalm.data.corpus.sources import find_sources

        for source in find_sources([self.texts])[rank::world_size]:
            for document in read_documents([source.name]):
                yield Document(text=document.text, id=document.place)


class WriteTexts(PipelineStep):
    """One .jsonl file for each task."""

    name, type = "OpenPaLM rows", "Writer"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{rank:05d}.jsonl").open("w", encoding="utf-8") as file:
            for document in data:
                file.write(json.dumps({"text": document.text, "id": document.id}) + "\n")
                yield document


class PrepareShard(PipelineStep):
    """Tokenizes one part of the documents in `texts`; the number of the task is the part's."""

    name, type = "OpenPaLM tokens", "Tokenizer"

    def __init__(self, texts: Path, parts: Path, tokenizer: str):
        super().__init__()
        self.texts, self.parts, self.tokenizer = texts, parts, tokenizer

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        from openpalm.data.prepare.preparation import PrepareRequest, prepare

        yield from data or ()
        request = PrepareRequest(
            inputs=[str(self.texts)],
            out=self.parts / str(rank),
            tokenizer=self.tokenizer,
            workers=1,
            shard=f"{rank + 1}/{world_size}",
        )
        prepare(request)


def run_step(name: str, steps: list[PipelineStep], tasks: int, given: argparse.Namespace) -> None:
    logs = str(given.work / "logs" / name)
    LocalPipelineExecutor(steps, tasks=tasks, workers=given.tasks, logging_dir=logs).run()


def remove_near_duplicates(given: argparse.Namespace) -> Path:
    """The folder of the documents that are kept."""
    work = given.work
    # datatrove's xxhash refuses texts in some versions; SHA-1 is the same everywhere.
    hashing = HashConfig(precision=64, hash_fc="sha1")
    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8, hash_config=hashing)
    signatures, buckets, remove = (str(work / name) for name in ("signatures", "buckets", "remove"))
    signing = MinhashDedupSignature(signatures, config=config, language=Words())
    run_step("signatures", [ReadTexts(given.texts), signing], given.tasks, given)
    comparing = MinhashDedupBuckets(signatures, buckets, config=config)
    run_step("buckets", [comparing], config.num_buckets, given)
    run_step("cluster", [MinhashDedupCluster(buckets, remove, config=config)], 1, given)
    # The same tasks read the same files: the numbers of the documents must agree.
    steps = [ReadTexts(given.texts), MinhashDedupFilter(remove), WriteTexts(work / "kept")]
    run_step("filter", steps, given.tasks, given)
    return work / "kept"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--tasks", type=int, default=4)
    given = parser.parse_args()
    from openpalm.data.prepare.blocks import BlocksRequest, write_blocks
    from openpalm.data.prepare.parts import build
    from openpalm.data.prepare.preparation import PrepareRequest

    kept, parts, tokens = remove_near_duplicates(given), given.work / "parts", given.work / "tokens"
    run_step("tokens", [PrepareShard(kept, parts, given.tokenizer)], given.tasks, given)
    build([parts / str(i) for i in range(given.tasks)], tokens)
    request = PrepareRequest(inputs=[str(tokens)], out=given.out, tokenizer=given.tokenizer)
    manifest = write_blocks(BlocksRequest(prepare=request, sequence_length=given.seq_len))
    for split, entry in manifest.splits.items():
        print(f"{split}: {entry.documents:,} documents, {entry.tokens:,} tokens in blocks")


if __name__ == "__main__":
    main()
