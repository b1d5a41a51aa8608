"""The method table, features x methods, derived from the rows that the registry holds: it cannot drift from them."""

from __future__ import annotations

from collections.abc import Iterator

from mtkd.config.match import Match
from mtkd.methods.spec import METHODS, MethodSpec

FEATURES = (
    *("embedding", "A-scores", "A-probs", "query", "key", "value", "layers", "last layer"),
    *("logits", "MLM", "NSP", "soft", "hard"),
)
COLUMNS = ("name", "stages", *FEATURES, "must be equal")

_SHOWN = {"scores": "A-scores", "probs": "A-probs", "nsp_logits": "NSP"}
_FAMILIES = {
    **dict.fromkeys(("mse", "normalized_mse", "attention_mse", "label_mse"), "MSE"),
    **dict.fromkeys(("kl", "attention_kl", "relation_kl"), "KL"),
    **dict.fromkeys(("ce", "soft_ce"), "CE"),
    **dict.fromkeys(("dist_inter", "dist_intra"), "corr"),
    "dkd": "DKD",
}


def method_table() -> list[dict[str, str]]:
    """One row per method, column -> cell; a cell names the loss of the feature, "" where the method has none."""
    return [_row(name, spec) for name, spec in METHODS.items()]


def _row(name: str, spec: MethodSpec) -> dict[str, str]:
    cells: dict[str, list[str]] = {feature: [] for feature in FEATURES}
    for step, row in _every_row(spec):
        for column in _columns(row, step):
            family = _FAMILIES.get(row.loss, row.loss)
            if family not in cells[column]:
                cells[column].append(family)
    shown = {feature: " ".join(families) for feature, families in cells.items()}
    return {"name": name, "stages": _stages(spec), **shown, "must be equal": ", ".join(spec.must_be_equal) or "-"}


def _every_row(spec: MethodSpec) -> Iterator[tuple[str, Match]]:
    """(step, row) of every step and variant."""
    for variant in spec.variants:
        for step in spec.steps:
            for row in spec.rows(variant, step).values():
                yield step, row


def _columns(row: Match, step: str) -> tuple[str, ...]:
    """Where a row stands. Logits and labels are `soft` and `hard` on a task, `logits` and `MLM` on plain text."""
    if row.feature == "logits":
        on_text = step == "pre-train" or row.positions == "all"
        if row.target == "labels":
            return ("MLM" if on_text else "hard",)
        return ("logits" if on_text else "soft",)
    if row.feature in ("hidden", "cls"):
        return _depths(row)
    return (_SHOWN.get(row.feature, row.feature),)


def _depths(row: Match) -> tuple[str, ...]:
    """`layers`, `last layer` or both; PKD-last compares the layers before the last with the teacher's last ones."""
    if row.student_layer == "last" or (row.student_layer == "each" and row.teacher_layer == "last"):
        return ("last layer",)
    if row.student_layer == "each" and row.teacher_layer in ("uniform", "each"):
        return ("layers", "last layer")
    return ("layers",)


def _stages(spec: MethodSpec) -> str:
    """ "pre-train, fine-tune x2": prediction is a second fine-tuning."""
    fine_tunings = len([step for step in spec.steps if step != "pre-train"])
    parts = ["pre-train"] if "pre-train" in spec.steps else []
    if fine_tunings:
        parts.append("fine-tune" if fine_tunings == 1 else f"fine-tune x{fine_tunings}")
    return ", ".join(parts)
