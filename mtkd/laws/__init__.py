"""Laws that every loss and weighting keeps, the built-in ones and a plug-in author's own.

    from mtkd.laws import check_loss, check_tiled, check_weighting
    check_loss("my_loss")  # raises LawBroken with the law, the name and what was found

Each law is one function, run over a small bank of inputs: the features that a loss reads, or teachers' logits for a
weighting. Every input has padding.
"""

from mtkd.broken import LawBroken
from mtkd.losses.laws import check_loss
from mtkd.objective.laws import check_tiled
from mtkd.weightings.laws import check_weighting

__all__ = ["LawBroken", "check_loss", "check_tiled", "check_weighting"]
