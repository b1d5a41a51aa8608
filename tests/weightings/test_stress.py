"""Do weightings find out which teacher is worth what? One is good, one knows half of the classes, one is noise."""

from __future__ import annotations

from functools import cache

import pytest
from specialists import Outcome, Task, distil, make_task

SEEDS = (0, 1)

pytestmark = pytest.mark.xdist_group("stress")  # they share trained students


@cache
def task(seed: int, sure_noise: bool) -> Task:
    return make_task(seed, sure_noise)


@cache
def outcome(weighting: str, seed: int, sure_noise: bool, hard: float = 0.5) -> Outcome:
    return distil(task(seed, sure_noise), weighting, seed, hard)


@pytest.mark.parametrize(
    ("weighting", "sure_noise", "seed"),
    [
        *(("learned", sure, seed) for sure in (False, True) for seed in SEEDS),
        *((name, sure, 0) for name in ("mgda", "ae_kd", "rl_kd") for sure in (False, True)),
        ("confidence", False, 0),
        ("margin", False, 0),
    ],
)
def test_the_noise_is_found_out_and_the_student_is_better_for_it(weighting: str, sure_noise: bool, seed: int) -> None:
    """The random teacher weighs least, and the student's held-out loss is below that of equal weights."""
    found, plain = outcome(weighting, seed, sure_noise), outcome("uniform", seed, sure_noise)
    told = f"{weighting}: {found}\nuniform: {plain}"
    good, half, noise = found.weights
    assert noise < min(0.3, good, half), told
    assert found.loss < plain.loss, told


@pytest.mark.parametrize("seed", SEEDS)
def test_the_learned_weights_rank_the_teachers(seed: int) -> None:
    """The teacher that is right more often gets more weight."""
    for sure_noise in (False, True):
        found = outcome("learned", seed, sure_noise)
        good, half, noise = found.weights
        assert good > 0.6, str(found)
        assert noise < 0.1, str(found)
        assert noise < half < good, str(found)


def test_confidence_believes_a_random_teacher_that_is_sure() -> None:
    """What it cannot know without labels: measured, and so that nobody claims otherwise."""
    for weighting in ("confidence", "margin"):
        found = outcome(weighting, 0, True)
        good, half, noise = found.weights
        assert abs(good - noise) < 0.1, str(found)
        assert half < noise, str(found)


def test_gradient_space_weights_without_labels_follow_whoever_is_nearest_to_the_student() -> None:
    """The smallest gradient is that of a teacher as unsure as a fresh student: here the noise. Labels break the tie."""
    found, plain = outcome("mgda", 0, False, hard=0.0), outcome("uniform", 0, False, hard=0.0)
    told = f"mgda: {found}\nuniform: {plain}"
    good, _, noise = found.weights
    assert noise > 0.5 > good, told
    assert found.loss > plain.loss, told
