"""Damages of a run folder, end to end: one per type of file. `benchmarks/damage.py` draws them by the hundred."""

from __future__ import annotations

from pathlib import Path

import pytest
from damages import STATES, Bench, Damage

pytestmark = pytest.mark.xdist_group("damage")

DAMAGES = (
    (Damage("lm-stopped", "stages/02-cache/export/identity.json", "cut", 3), "recovered"),
    (Damage("lm-stopped", "stages/02-cache/export/seconds.json", "as_folder", 1), "recovered"),
    (Damage("lm-stopped", "stages/02-cache/export/teacher/shard-00001.safetensors", "flip", 1), "detected"),
    (Damage("lm-stopped", "stages/03-student/checkpoints/step-000006/state.json", "cut", 1), "recovered"),
    (Damage("lm-stopped", "tokenizer/tokenizer.json", "flip", 1), "recovered"),
    (Damage("class-finished", "stages/01-teacher/export/model.safetensors", "flip", 1), "detected"),
    (Damage("class-finished", "stages/01-teacher/DONE", "other_json", 3), "detected"),
    (Damage("class-finished", "results.json", "other_value", 1), "recovered"),
    (Damage("class-finished", "plots/training.png", "as_fifo", 1), "no effect"),
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("damage"), draws=False)
    for state in sorted({damage.state for damage, _ in DAMAGES}):
        assert state in STATES
        bench.make(state)
    return bench


@pytest.mark.parametrize(("damage", "verdict"), DAMAGES, ids=lambda value: getattr(value, "path", value))
def test_a_damage_is_told_or_mended(bench: Bench, damage: Damage, verdict: str) -> None:
    """What the damaged run comes to is what the undamaged one does, bit by bit, or is refused with the file."""
    assert Path(bench.undamaged(damage.state) / "runs" / "tiny" / damage.path).exists()
    found, said = bench.judge(damage)
    assert found == verdict, said
