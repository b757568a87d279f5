"""Orthogonalising matrices for Muon, also matrices of which every process holds a part.

Newton-Schulz needs a whole matrix. Of a batch of as many matrices as processes, each process
collects one, orthogonalises it and sends the parts back: no matrix is computed twice, and a process
holds one at a time.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from openpalm.model.sharding import is_first_copy, local_slices
from openpalm.train.optimization.shards import coordinates, group_of

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of Jordan et al. 2024 that bring singular values near 1 in five steps."""
QUINTIC_STEPS = 5


def orthogonalised(x: Tensor) -> Tensor:
    """Approximates U V^T of the matrix x = U S V^T by a quintic Newton-Schulz iteration."""
    a, b, c = QUINTIC
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(QUINTIC_STEPS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def batches(matrices: Sequence[DTensor]) -> list[list[Tensor]]:
    """Batches of at most one matrix for each process of their mesh, of similar sizes."""
    by_mesh = defaultdict[DeviceMesh, list[Tensor]](list)
    for matrix in sorted(matrices, key=lambda m: -m.numel()):
        by_mesh[matrix.device_mesh].append(matrix)
    return [
        found[start : start + mesh.size()]
        for mesh, found in by_mesh.items()
        for start in range(0, len(found), mesh.size())
    ]


def orthogonalised_parts(parts: list[Tensor], owners: Sequence[Tensor]) -> list[Tensor]:
    """This process's parts of the orthogonalised matrices, from its parts of the matrices.

    owners: parameters on one mesh, at most as many as it has processes, which say how the matrices
    are cut. Process i gets the i-th matrix. Where several processes hold a part the first sends it,
    and all get the same result.
    """
    mesh = owners[0].device_mesh  # type: ignore[attr-defined]
    group, places = group_of(mesh.mesh), coordinates(mesh)
    me = places.index(tuple(mesh.get_coordinate()))
    mine = owners[me] if me < len(owners) else None
    matrix = _collected(parts, owners, mine, places, group)
    spans = [] if mine is None else [local_slices(mine, place) for place in places]
    if mine is not None:
        matrix = orthogonalised(matrix)
    sent = [matrix[span] for span in spans] or [parts[0].new_empty(0)] * len(places)
    sizes = [part.numel() for part in parts] + [0] * (len(places) - len(parts))
    back = _exchanged(sent, sizes, group)
    return [piece.view(part.shape) for piece, part in zip(back, parts, strict=False)]


def _collected(
    parts: list[Tensor],
    owners: Sequence[Tensor],
    mine: Tensor | None,
    places: list[tuple[int, ...]],
    group: object,
) -> Tensor:
    """This process's matrix, `mine`, whole; an empty one if it gets none."""
    nothing = parts[0].new_empty(0)
    sent = [p if is_first_copy(o) else nothing for p, o in zip(parts, owners, strict=True)]
    sent += [nothing] * (len(places) - len(parts))
    matrix = parts[0].new_empty((0, 0) if mine is None else mine.shape)
    targets = [
        matrix[local_slices(mine, place)]
        if mine is not None and is_first_copy(mine, place)
        else nothing
        for place in places
    ]
    pieces = _exchanged(sent, [target.numel() for target in targets], group)
    for target, piece in zip(targets, pieces, strict=True):
        target.copy_(piece.view(target.shape))
    return matrix


def _exchanged(sent: list[Tensor], sizes: list[int], group: object) -> list[Tensor]:
    """What every process of the group sent this one, flat; sizes: how much from each."""
    flat = torch.cat([piece.reshape(-1) for piece in sent])
    found = flat.new_empty(sum(sizes))
    dist.all_to_all_single(found, flat, sizes, [piece.numel() for piece in sent], group=group)
    return [*found.split(sizes)]
