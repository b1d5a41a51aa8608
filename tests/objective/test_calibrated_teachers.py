"""Laws of calibrated teachers in an objective: rows and weights read their logits over their own temperature."""

from __future__ import annotations

import pytest
import torch
from tiny import class_batch, classifier, make_objective

from mtkd.config.match import Match
from mtkd.data.batch import position_counts
from mtkd.models.calibrated import Calibration
from mtkd.pool import CalibratedTeacher, TeacherPool

OWN = (0.4, 2.5)  # temperature of each teacher
SOFT = 2.0  # of the row


def test_rows_and_weights_read_the_calibrated_teacher() -> None:
    """Law: the student's gradient is ``sum_k w_k T (softmax(s / T) - softmax(t_k / (own_k T))) / B``.

    Of two teachers w_k is ``1 - H_k / (H_1 + H_2)``, H the entropies of the calibrated distributions. The sum over
    examples of a row's gradient with respect to the student's logits is that of its head's bias.
    """
    batch = class_batch((5, 4, 6, 3))
    student, teachers = classifier(8, 1, seed=0), [classifier(8, 1, seed=seed) for seed in (1, 2)]
    match = Match(feature="logits", loss="kl", options={"temperature": SOFT})
    objective, pool = make_objective(student, teachers, [match], weighting="entropy")
    plain = [features["logits"].rows(torch.arange(4)) for features in pool.forward(batch)]  # type: ignore[union-attr]
    own = [CalibratedTeacher(t, Calibration(tau)) for t, tau in zip(pool.teachers, OWN, strict=True)]
    features = TeacherPool(own, pool.wants).forward(batch)
    objective.begin_step(0)
    loss, _ = objective(batch, features, position_counts([batch]))
    loss.backward()
    with torch.no_grad():
        scores = objective.student(batch, frozenset({"logits"}))["logits"].rows(torch.arange(4))
        sharp = [torch.softmax(t / tau, -1) for t, tau in zip(plain, OWN, strict=True)]
        entropy = torch.stack([-(p * p.log()).sum(-1) for p in sharp])  # [T,B]
        weights = 1 - entropy / entropy.sum(0)
        gradient = torch.zeros(3)
        for weight, logits, tau in zip(weights, plain, OWN, strict=True):
            gap = torch.softmax(scores / SOFT, -1) - torch.softmax(logits / (tau * SOFT), -1)
            gradient += (weight[:, None] * SOFT * gap).sum(0) / 4
    found = objective.student.model.classifier.bias.grad
    assert found.numpy() == pytest.approx(gradient.numpy(), abs=1e-6)
