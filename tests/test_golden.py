"""Nine recipes do what they did: losses of the first steps, plans, and messages for mistakes.

    ./launch/test tests/test_golden.py --golden renew      # writes tests/golden/ after a change that is meant
    ./launch/test tests/test_golden.py --golden record     # losses of this machine, bit by bit, into .golden/
    ./launch/test tests/test_golden.py --golden exact      # compares with them: what a refactoring must not change

Losses are compared at a relative 1e-4, which holds between processors; texts as they are.
"""

from __future__ import annotations

import json
from pathlib import Path

import golden_recipes
import pytest
from golden_recipes import RECIPES, STEPS, Workplace

GOLDEN = Path(__file__).parent / "golden"
EXACT = Path(__file__).parents[1] / ".golden"  # not in the repository: floating-point sums differ between processors
TOLERANCE = 1e-4


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    workplace = Workplace(tmp_path)
    workplace.prepare(monkeypatch)
    return workplace


@pytest.fixture
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--golden"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_planned_as_before(name: str, place: Workplace, mode: str) -> None:
    _compare_text(GOLDEN / name / "plan.txt", golden_recipes.plan_text(place, RECIPES[name]), mode)


@pytest.mark.parametrize("name", RECIPES)
def test_a_mistake_is_answered_as_before(name: str, place: Workplace, mode: str) -> None:
    _compare_text(GOLDEN / name / "errors.txt", golden_recipes.error_texts(place, RECIPES[name]), mode)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_learns_as_before(name: str, place: Workplace, mode: str) -> None:
    found = golden_recipes.losses(place, RECIPES[name])
    assert all(len(losses) == STEPS for losses in found.values())
    file = (EXACT if mode in ("record", "exact") else GOLDEN) / name / "losses.json"
    if mode in ("renew", "record"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(file.read_text())
    if mode == "exact":
        assert found == golden  # JSON keeps every bit of a float64
    else:
        assert found.keys() == golden.keys()
        for stage, losses in found.items():
            assert losses == pytest.approx(golden[stage], rel=TOLERANCE), stage


def _compare_text(file: Path, found: str, mode: str) -> None:
    if mode == "renew":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(found)
    assert found == file.read_text()
