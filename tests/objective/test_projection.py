"""Width adapters: which exist, between which widths, and from which randomness."""

from __future__ import annotations

import dataclasses

import torch

from mtkd.config.match import Match
from mtkd.methods.spec import METHODS
from mtkd.models.features import ATTENTION
from mtkd.models.info import ModelInfo
from mtkd.objective.compile import compile_rows
from mtkd.objective.projection import make_projections, projection_key

STUDENT = ModelInfo(
    architecture="bert",
    num_layers=2,
    width=8,
    num_heads=2,
    num_kv_heads=2,
    head_width=4,
    vocabulary=50,
    num_labels=0,
    max_positions=16,
    causal=False,
    taps=frozenset({"logits", "hidden", "embedding", "cls", *ATTENTION}),
)
EQUAL = dataclasses.replace(STUDENT, num_layers=4)
WIDE = dataclasses.replace(EQUAL, width=12, head_width=6)


def projections(*matches: Match, seed: int = 0) -> torch.nn.ModuleDict:
    teachers = {"equal": EQUAL, "wide": WIDE}
    rows = compile_rows(matches, STUDENT, teachers, token_level=True, regression=False, where="match")
    return make_projections(rows, STUDENT, list(teachers.values()), seed)


EACH = {"feature": "hidden", "loss": "mse", "student_layer": "each", "teacher_layer": "uniform"}


def test_one_adapter_per_row_and_teacher_of_another_width() -> None:
    """Equal widths need no adapter."""
    found = projections(*METHODS["tinybert"].rows({}).values())  # embedding, hidden, scores
    assert sorted(found) == ["row0_teacher1", "row1_teacher1"]
    for linear in found.values():
        assert (linear.in_features, linear.out_features, linear.bias) == (8, 12, None)


def test_nothing_to_adapt() -> None:
    """Rows on logits, labels and maps, and relations with heads of their own, have no adapter."""
    matches = (Match(), Match(loss="ce", target="labels"), Match(feature="scores", loss="attention_mse"))
    assert len(projections(*matches)) == 0
    assert len(projections(Match(feature="query", loss="relation_kl", options={"heads": 4}))) == 0


def test_per_layer_adapters_exist_at_equal_width_too_and_start_as_no_change() -> None:
    """`per_layer` has an adapter for every pair, at first the identity."""
    found = projections(Match(**EACH, projection="per_layer"))
    assert sorted(found) == [f"row0_teacher{k}_pair{pair}" for k in (0, 1) for pair in (0, 1)]
    for pair in (0, 1):
        assert torch.equal(found[f"row0_teacher0_pair{pair}"].weight, torch.eye(8))
        assert found[f"row0_teacher1_pair{pair}"].weight.shape == (12, 8)


def test_names_agree_with_what_the_objective_looks_up() -> None:
    """Adapters have the names that the objective asks for."""
    for projection in ("shared", "per_layer"):
        match = Match(**EACH, projection=projection)
        teachers = {"equal": EQUAL, "wide": WIDE}
        (row,) = compile_rows([match], STUDENT, teachers, token_level=True, regression=False, where="match")
        found = make_projections([row], STUDENT, [EQUAL, WIDE], 0)
        assert {projection_key(row, 0, 1, pair) for pair in (0, 1)} <= set(found)
        assert (projection_key(row, 0, 0, 0) in found) == (projection == "per_layer")


def test_the_cls_row_is_adapted_too() -> None:
    """Its adapter exists for the teacher of another width alone."""
    match = Match(feature="cls", loss="normalized_mse", student_layer="each", teacher_layer="skip")
    assert sorted(projections(match)) == ["row0_teacher1"]


def test_initialisation_follows_the_seed_alone() -> None:
    """The global random state neither matters nor changes."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = projections(Match(**EACH), seed=5)["row0_teacher1"].weight
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(projections(Match(**EACH), seed=5)["row0_teacher1"].weight, first)
    assert not torch.equal(projections(Match(**EACH), seed=6)["row0_teacher1"].weight, first)
