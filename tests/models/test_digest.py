"""Two folders of weights have one digest only if they are the same model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mtkd.models.digest import weights_digest
from mtkd.models.folder import WEIGHTS


def saved(folder: Path, change: Callable[[dict[str, torch.Tensor]], object] = len) -> str:
    """Digest of a model whose trunk has 16 MB, far more than what is read of it."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.trunk": (2000, 1000), "b.norm": (1000,), "c.head": (3, 1000), "d.trunk": (2000, 1000)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    change(weights)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file(weights, folder / WEIGHTS)
    return weights_digest(folder)


@pytest.mark.parametrize("name", ["b.norm", "c.head", "d.trunk"])
def test_another_head_on_the_same_trunk_is_another_model(tmp_path: Path, name: str) -> None:
    """However small the weight that was trained: every one of its rows counts, of large ones the ends."""
    same = saved(tmp_path)
    assert saved(tmp_path / "elsewhere") == same
    for row in (0, -1):
        assert saved(tmp_path, lambda weights, row=row: weights[name][row].add_(0.1)) != same


def test_a_small_file_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = {"w": torch.zeros(1000, 1000)}
    save_file(weights, tmp_path / WEIGHTS)
    found = {weights_digest(tmp_path)}
    for place in range(0, 1_000_000, 99_991):
        changed = weights["w"].clone()
        changed.view(-1)[place] = 1.0
        save_file({"w": changed}, tmp_path / WEIGHTS)
        found.add(weights_digest(tmp_path))
    assert len(found) == 12
