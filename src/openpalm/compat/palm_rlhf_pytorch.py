"""palm-rlhf-pytorch's classes with its names and arguments: only the import line changes.

Follows its README and the constructors of 0.8.0; docs/compat.md lists the differences.
"""

from openpalm.compat.palm import PaLM, top_k, top_p
from openpalm.compat.reward import RewardModel
from openpalm.compat.rlhf import RLHFTrainer

__all__ = ["PaLM", "RLHFTrainer", "RewardModel", "top_k", "top_p"]
