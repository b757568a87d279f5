"""Eras of palm-rlhf-pytorch: versions that compute one function from the same tensor names.

Taken from the source of the published packages, and all but 0.0.2 confirmed by running them.
"""

import re
from dataclasses import dataclass, replace

from openpalm.errors import CheckpointError


@dataclass(frozen=True)
class Era:
    """Versions `first` to `last` compute one function from one state dict."""

    first: str
    last: str
    gamma_minus_one: bool
    """norm scales (gamma) are stored minus one"""
    final_norm: bool
    """logits are computed from the final norm, else from the residual stream"""
    xpos: bool
    """causal models use xPos decay"""
    qk_scale: float | None = None
    """factor of the attention scores with qk_rmsnorm; None is dim_head^-0.5"""

    def __str__(self) -> str:
        return self.first if self.first == self.last else f"{self.first} to {self.last}"


ERAS = (
    Era("0.0.2", "0.0.2", gamma_minus_one=False, final_norm=True, xpos=False),
    Era("0.0.30", "0.0.30", gamma_minus_one=False, final_norm=False, xpos=False),
    Era("0.0.50", "0.0.68", gamma_minus_one=False, final_norm=False, xpos=True, qk_scale=8.0),
    Era("0.1.0", "0.2.0", gamma_minus_one=False, final_norm=False, xpos=True),
    Era("0.2.1", "0.2.3", gamma_minus_one=False, final_norm=True, xpos=True),
    Era("0.2.4", "0.8.0", gamma_minus_one=True, final_norm=True, xpos=True),
)
NEWEST = ERAS[-1]


def era_of(version: str) -> Era:
    """The era of a version such as 0.7.5. Raises CheckpointError listing the eras."""
    for era in ERAS:
        numbers = _numbers(version)
        if numbers and _numbers(era.first) <= numbers <= _numbers(era.last):
            return era
    known = ", ".join(str(era) for era in ERAS)
    raise CheckpointError(f"--era {version}: unknown version; the eras are {known}")


def is_known_version(version: str) -> bool:
    """Whether `era_of` knows the version."""
    try:
        return bool(era_of(version))
    except CheckpointError:
        return False


def guess_era(gamma: float, *, has_scale: bool, norm_unused: bool) -> tuple[Era, str]:
    """The most likely era, and the reason.

    gamma: mean of the blocks' norm scales; has_scale: xPos buffers were saved; norm_unused: the
    final norm is exactly one, unlike the others, so it had no gradient.
    """
    mean = f"norm scales average {gamma:.2f}"
    if gamma < 0.5:
        if not has_scale:
            return replace(NEWEST, xpos=False), f"{mean}, stored minus one; no xPos was saved"
        return NEWEST, f"{mean}, so they are stored minus one"
    if not has_scale:
        reason = f"{mean} as stored, and no xPos scale was saved"
        if norm_unused:
            return era_of("0.0.30"), f"{reason}; the final norm was never trained"
        return era_of("0.0.2"), f"{reason}; the final norm was trained"
    if norm_unused:
        return era_of("0.2.0"), (
            f"{mean} as stored, and the final norm was never trained, as before 0.2.1; "
            "if it has qk_rmsnorm and is older than 0.1.0, give --era 0.0.68"
        )
    return era_of("0.2.1"), (
        f"{mean} as stored; older versions write the same names: give --era if you know it"
    )


def _numbers(version: str) -> tuple[int, ...]:
    if not re.fullmatch(r"v?[0-9]{1,4}(\.[0-9]{1,4}){1,2}", version):
        return ()
    numbers = tuple(int(part) for part in version.removeprefix("v").split("."))
    return (*numbers, 0)[:3]
