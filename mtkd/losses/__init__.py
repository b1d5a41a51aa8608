"""Losses: pure functions ``(student, teacher, mask, *, options) -> per-position values``, one idea a file.

Nothing is reduced here; the objective divides every row once, by the global number of its valid positions.
"""

from mtkd.losses import attention, distributions, labels, policy, relations, vectors

__all__ = ["attention", "distributions", "labels", "policy", "relations", "vectors"]
