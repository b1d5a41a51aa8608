"""The settings of a stage's objective besides its models, rows and weighting."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Wiring:
    """Which positions share weights and tiles, and the number format of the products.

    Attributes:
        per: "example" or "token" weights.
        token_level: targets are [B,L], logits are vocabulary-size.
        tile: positions per tile.
        dtype: of the matrix products: bfloat16 runs the student under autocast; losses stay float32.
        seed: of the projections.
        teach: whether teacher k teaches texts of domain d (`Batch.routes`), [D+1][T]; () where every teacher does.
    """

    per: str
    token_level: bool
    tile: int = 256  # 256 was fast enough on two machines; a run takes it from its engine
    dtype: torch.dtype = torch.float32
    seed: int = 0
    teach: tuple[tuple[bool, ...], ...] = ()

    @property
    def weights_per_token(self) -> bool:
        """Whether a weight belongs to a token.

        The weights cannot tell: a micro-batch of one-token sequences has L = 1 either way.
        """
        return self.per == "token" and self.token_level
