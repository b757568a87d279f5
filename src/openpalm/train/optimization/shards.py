"""Parameters of which every process holds a part: local parts, and norms of whole tensors.

A parameter of one process is an ordinary tensor, and every function here accepts it too.
"""

# pyright: reportPrivateImportUsage=false
# (torch's operations on lists have no public names.)

import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from openpalm.model.sharding import local_part, local_slices
from openpalm.parallel.world import world


def local_gradient(parameter: Tensor) -> Tensor:
    """This process's part of the gradient, which is cut as the parameter is.

    A gradient that is still a partial sum on each process, as tensor parallelism leaves them, is
    summed first.
    """
    gradient = parameter.grad
    assert gradient is not None
    if not (isinstance(parameter, DTensor) and isinstance(gradient, DTensor)):
        return gradient
    if gradient.placements != parameter.placements:
        gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
        parameter.grad = gradient
    return local_part(gradient)


def with_part(parameter: Tensor, part: Tensor) -> Tensor:
    """A tensor that is cut as the parameter is, with this part on this process."""
    if not isinstance(parameter, DTensor):
        return part
    # from_local would move a part in the CPU's memory to the mesh's device.
    return DTensor(part, parameter._spec, requires_grad=False)  # pyright: ignore


def local_part_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's part, for a parameter cut as `parameter`, of a value of the same shape.

    value: a whole tensor, the same on every process, or one cut in any way; if it is cut in another
    way than the parameter, all processes must call this.
    """
    if isinstance(value, DTensor):
        cuts = [(t.device_mesh, t.placements) for t in (value, parameter) if isinstance(t, DTensor)]
        if len(cuts) == 2 and cuts[0] == cuts[1]:
            return value.to_local()
        value = value.full_tensor()
    if not isinstance(parameter, DTensor):
        return value
    return value[local_slices(parameter)].clone()  # a view would keep the whole value


def whole_norms(parameters: Sequence[Tensor], norms: Sequence[Tensor]) -> list[Tensor]:
    """Norms of whole tensors cut as `parameters`, from the norms of this process's parts.

    One sum over the processes for all tensors. Processes of one pipeline stage call it together.
    """
    squares = torch.stack([*norms]).double().square()
    squares /= torch.tensor([copies(p) for p in parameters], device=squares.device)
    dist.all_reduce(squares, group=stage_group())
    return [*squares.sqrt().to(norms[0].dtype).unbind()]


def squared_norm(parameters: Iterable[Tensor], uncounted: Collection[Tensor] = ()) -> float:
    """This process's share of the squared norm of all gradients.

    The shares of all processes add up to it: a part that several hold counts once, and parameters
    in `uncounted` not at all.
    """
    counted = [p for p in parameters if p.grad is not None and not any(p is u for u in uncounted)]
    if not counted:
        return 0.0
    norms = torch.stack([*torch._foreach_norm([local_gradient(p) for p in counted])])
    shares = torch.tensor([copies(p) for p in counted], dtype=torch.float64)
    return float((norms.cpu().double().square() / shares).sum())


def copies(parameter: Tensor) -> int:
    """The number of processes that hold the same part of a parameter."""
    parts = 1
    if isinstance(parameter, DTensor):
        cut = (n for n, p in enumerate(parameter.placements) if not p.is_replicate())
        parts = math.prod(parameter.device_mesh.size(n) for n in cut)
    return world().size // world().axes.pipeline // parts


def stage_group() -> Any:
    """The processes of this one's pipeline stage, which hold parts of the same parameters."""
    mesh = world().mesh
    if mesh is None or world().axes.pipeline == 1:
        return dist.group.WORLD
    return group_of(mesh.mesh[world().coordinate["pipeline"]])


_groups: dict[tuple[int, ...], Any] = {}


def group_of(ranks: Tensor) -> Any:
    """The group of these processes, in ascending order; all of them call it together."""
    members = (*ranks.flatten().tolist(),)
    assert members == (*sorted(members),), "a group numbers its processes in ascending order"
    if len(members) == dist.get_world_size():
        return dist.group.WORLD
    if members in _groups and _groups[members][0] is dist.group.WORLD:
        return _groups[members][1]
    group = dist.new_group(list(members), use_local_synchronization=True)
    _groups[members] = dist.group.WORLD, group  # of this default group only: tests make several
    return group


def coordinates(mesh: DeviceMesh) -> list[tuple[int, ...]]:
    """The coordinate of each process of a mesh, in the order of their group."""
    return [*itertools.product(*(range(size) for size in mesh.shape))]
