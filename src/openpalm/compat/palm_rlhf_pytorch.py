"""palm-rlhf-pytorch's own classes: where it is imported, only the import changes.

Source: its README and 0.8.0's constructors; what differs, and why, is in docs/compat.md.
"""

from openpalm.compat.palm import PaLM, top_k, top_p
from openpalm.compat.reward import RewardModel
from openpalm.compat.rlhf import RLHFTrainer

__all__ = ["PaLM", "RLHFTrainer", "RewardModel", "top_k", "top_p"]
