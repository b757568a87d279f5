"""Repeated digests are those that a set has seen, whatever the number of buckets."""

import numpy as np
import pytest

from openpalm.data.prepare import duplicates
from openpalm.data.prepare.duplicates import repeated_documents


@pytest.mark.parametrize("bucket", [7, 100, 1 << 20])
def test_every_document_but_the_first_of_its_digest(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "BUCKET_DOCUMENTS", bucket)
    # Equal first or second halves are not enough to be a duplicate.
    digests = np.random.default_rng(0).integers(0, 12, (500, 2)).astype(np.uint64)
    seen, expected = set(), []
    for number, digest in enumerate(map(tuple, digests.tolist())):
        if digest in seen:
            expected.append(number)
        seen.add(digest)
    slices = [(np.arange(i, min(i + 64, 500)), digests[i : i + 64]) for i in range(0, 500, 64)]
    found = np.concatenate(list(repeated_documents(slices, 500, tmp_path)))
    assert sorted(found.tolist()) == expected
    assert not list(tmp_path.iterdir())
