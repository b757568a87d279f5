"""The layout of mesh-transformer-jax checkpoints, version 1, which the released GPT-J has.

    model_dir/  meta.json  step_N/  shard_I/  0.npz ... 15.npz  (arr_0, arr_1, ... in each)

Nothing in the files names an array: the order of the leaves decides. First come the optimizer's
(count, first moments, second moments, schedule count), then the parameters, then the step. A slim
checkpoint has no optimizer leaves. The leaves are cut into 16 consecutive files.
"""

from typing import Literal, NamedTuple

from openpalm.convert.gptj.names import part_shapes
from openpalm.model.config import ModelConfig

FILES = 16
"""npz files of a shard"""

Join = Literal["rows", "columns", "sum", "first"]
"""How the shards of a leaf, as the file has it, become one array.

rows, columns: concatenated on axis 0 or 1; sum: every shard holds a share of a bias that the model
sums; first: only the copy of shard 0 is used and trained, the other copies stay at 1 and 0.
"""


class Leaf(NamedTuple):
    name: str
    """part name, see names.py"""
    join: Join
    shape: tuple[int, ...]
    """shape of the joined array in the file's orientation: matrices are [in, out]"""
    transposed: bool
    """whether the file's orientation is the transpose of OpenPaLM's"""

    def shard_shape(self, shards: int) -> tuple[int, ...]:
        if self.join == "rows":
            return (self.shape[0] // shards, *self.shape[1:])
        if self.join == "columns":
            return (self.shape[0], self.shape[1] // shards)
        return self.shape


_FIRST: tuple[tuple[str, Join], ...] = (("embedding_bias", "sum"), ("embedding", "rows"))
_LAST: tuple[tuple[str, Join], ...] = (
    ("head_bias", "rows"),
    ("unembedding", "columns"),
    ("norm.bias", "first"),
    ("norm.weight", "first"),
)
# The order of the haiku modules linear, linear_1, ..., with b before w and offset before scale.
_OF_BLOCK: tuple[tuple[str, Join], ...] = (
    ("project_in.q", "columns"),
    ("project_in.v", "columns"),
    ("project_in.k", "columns"),
    ("project_out.out", "rows"),
    ("project_in.up_bias", "rows"),
    ("project_in.up", "columns"),
    ("project_out.down_bias", "sum"),
    ("project_out.down", "rows"),
    ("norm.bias", "first"),
    ("norm.weight", "first"),
)


def leaves_of(config: ModelConfig) -> list[Leaf]:
    """The parameters in the order of the files."""
    of_layers: list[tuple[str, Join]] = []
    # Layers sort as text: 0, 1, 10, 11, ..., 2, 20, ...
    for layer in sorted(range(config.depth), key=str):
        of_layers.extend((f"blocks.{layer}.{name}", join) for name, join in _OF_BLOCK)
    shapes = part_shapes(config)
    leaves = []
    for name, join in (*_FIRST, *of_layers, *_LAST):
        shape = shapes[name]
        transposed = len(shape) == 2 and name != "embedding"
        leaves.append(Leaf(name, join, shape[::-1] if transposed else shape, transposed))
    return leaves


def places_of(count: int) -> list[tuple[int, int]]:
    """For each of `count` leaves, the number of its file and its number in that file."""
    least, more = divmod(count, FILES)
    sizes = [least + (file < more) for file in range(FILES)]
    return [(file, index) for file, size in enumerate(sizes) for index in range(size)]


class Sections(NamedTuple):
    """The index of the first leaf of each section; a slim checkpoint has only the parameters."""

    leaves: int
    """number of all leaves"""
    parameters: int
    moments: tuple[int, int] | None
    """first and second moments"""


def sections(parameters: int, *, optimizer: bool) -> Sections:
    """`parameters` is the number of parameter leaves."""
    if not optimizer:
        return Sections(parameters + 1, 0, None)
    before = 2 * parameters + 2  # the counts of Adam and of the schedule, and the moments
    return Sections(before + parameters + 1, before, (1, 1 + parameters))
