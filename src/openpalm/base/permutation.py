"""Pseudorandom permutation of any length, computed index by index (Feistel network, SplitMix64)."""

_MASK64 = (1 << 64) - 1


def shuffled(index: int, size: int, key: int) -> int:
    """The image of `index` in the permutation of range(size) given by `key`.

    A four-round Feistel network over the next even power of two, repeated until the result is
    below `size` (cycle walking; Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    It needs no table in memory, and no new version of a library can change the order.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            left, right = right, left ^ (mix64(key + (turn << 56) + right) & mask)
        index = left << half | right
        if index < size:
            return index


def order_key(seed: int, epoch: int) -> int:
    return mix64(mix64(seed) + epoch)


def mix64(value: int) -> int:
    """A 64-bit number that looks random (the finaliser of SplitMix64, Steele et al. 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
