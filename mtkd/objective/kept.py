"""Cached teachers in the logits rows: k columns and the mass of all others, against the student's whole row.

Any loss takes a cached teacher once `densify` has completed it: the unseen mass gets the shape of the student's own
tail, detached. Divergences then equal those of k + 1 outcomes, in value and gradient. `mtkd.objective.onepass` has the
shorter way of `kl` and `soft_ce`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtkd.errors import UserError
from mtkd.losses.distributions import no_term
from mtkd.models.features import Logits, SparseLogits, SparseRows
from mtkd.objective.compile import Row
from mtkd.pool.cache.content import CacheContent


def read(logits: Logits, index: Tensor) -> Tensor | SparseRows:
    """Rows [m,V] of logits at the flat positions `index` [m], or the columns that a cached teacher keeps there."""
    return logits.sparse(index) if isinstance(logits, SparseLogits) else logits.rows(index)


def densify(teacher: SparseRows, student: Tensor) -> Tensor:
    """Logits [m,V] of the teacher at its temperature T, completed by the student; detached.

    ``T log p(v)`` with p as stored at the kept columns and ``p(v) = tail * p_S(v) / sum of p_S over the others``
    elsewhere. Every f-divergence (KL in both directions, JSD, total variation) is then that of k + 1 outcomes, and so
    is its gradient: within the tail the ratio of the two is one number. Drawn columns stand for the whole distribution;
    their weights, of sum 1 in the mean, are divided by their sum.

    Args:
        student: its logits, [m,V].
    """
    student = student.detach() / teacher.temperature  # [m,V]
    known = teacher.log_probs.to(student.dtype)
    if teacher.tail is None:
        # Unused places repeat a column with a tiny weight: the largest one counts.
        whole = torch.zeros_like(student) + (known.min() if known.numel() else 0.0)  # no number that the host reads
        return teacher.temperature * whole.scatter_reduce(-1, teacher.ids, known, "amax")
    others = torch.log_softmax(student, -1).scatter(-1, teacher.ids, -torch.inf)
    shift = teacher.tail.to(student.dtype) - others.logsumexp(-1)
    return teacher.temperature * (others + shift[:, None]).scatter(-1, teacher.ids, known)


def completed(row: Row, student: Tensor, teacher: Tensor | SparseRows) -> tuple[Tensor, Mapping[str, Any]]:
    """(a teacher's whole rows [m,V], the options of the row's loss for them).

    ``top: n`` is applied here: n columns and a tail stay of the cache's k, and are completed.
    """
    options = row.match.options
    if isinstance(teacher, Tensor):
        return teacher, options
    if not options.get("top"):
        return densify(teacher, student), options
    return densify(_narrowed(teacher, int(options["top"])), student), {**options, "top": 0}


def _narrowed(teacher: SparseRows, count: int) -> SparseRows:
    """The `count` most probable columns; the mass of the others joins the tail."""
    assert teacher.tail is not None
    if count >= teacher.ids.shape[1]:
        return teacher
    order = teacher.log_probs.argsort(-1, descending=True)
    ids, log_probs = teacher.ids.gather(-1, order), teacher.log_probs.gather(-1, order)
    tail = torch.cat([log_probs[:, count:], teacher.tail[:, None]], -1).logsumexp(-1)
    return SparseRows(ids[:, :count], log_probs[:, :count], tail, teacher.temperature)


def check_known(rows: Sequence[Row], logits: Sequence[Logits]) -> None:
    """`check_cached_row` for the cached teachers of a micro-batch: another temperature would change numbers silently.

    Raises:
        UserError: the plan refuses it before, unless the cache was exchanged since.
    """
    for teacher in logits:
        if isinstance(teacher, SparseLogits):
            values = teacher.values
            kind = "top" if values.tail is not None else "sampled"
            for row in rows:
                check_cached_row(row, kind, values.ids.shape[1], values.temperature, row.place)


def check_cached_rows(rows: Sequence[Row], content: CacheContent, where: str) -> None:
    """`check_cached_row` for every row of a stage, in the plan.

    Raises:
        UserError: also where any logits row counts positions without a target: all rows share one pass over them.
    """
    everywhere = [row for row in rows if row.is_logits and row.match.positions == "all"]
    if content.per_token and everywhere:
        raise UserError(
            f"row '{everywhere[0].key}': a cache holds targets only at positions with a target",
            where=everywhere[0].place or where,
            found="positions: all",
            allowed="targets",
        )
    for row in rows:
        check_cached_row(row, content.targets, content.k, content.temperature, row.place or where)


def check_cached_row(row: Row, targets: str, k: int, temperature: float, where: str) -> None:
    """Refuse a logits row that a cache of token targets cannot serve. Whole class logits serve every row.

    Args:
        targets: `CacheContent.targets`.
        k: `CacheContent.k`.
        temperature: `CacheContent.temperature`.

    Raises:
        UserError: a loss that needs whole rows, or logits as vectors; another temperature than the cache's; more
            columns than are kept; drawn columns in a loss that is not linear in the teacher's distribution.
    """
    if row.from_labels or not row.is_logits or targets == "classes":
        return
    spec, match = row.spec, row.match
    _check_whole(row, targets, where)
    asked, _ = spec.temperature(match.options)
    if asked != temperature:
        raise UserError(
            f"loss '{spec.name}' and the cache have different temperatures",
            where=where,
            found=f"temperature {asked:g} in the row",
            allowed=f"temperature {temperature:g}, at which the cache was made",
            todo="make the cache at the row's temperature, or change the row's",
        )
    if "hidden" in spec.inputs:
        raise UserError(
            f"loss '{spec.name}' compares logits as vectors; a cache of {targets} targets holds probabilities",
            where=where,
            todo="use a divergence (kl, jsd, ...), or run the teacher itself",
        )
    top = match.options.get("top", 0)
    # With `top` soft_ce has one outcome for the tail; completed rows have the student's whole tail in it.
    unlike = targets == "sampled" or top > k or match.ensemble != "losses" or spec.teacher_term is no_term
    if top and unlike:
        raise UserError(
            "the cache cannot give these most probable columns",
            where=where,
            found=f"top: {top}, ensemble: {match.ensemble}",
            allowed=f"top up to {k} of a divergence, ensemble: losses" if targets == "top" else "no option top",
        )
    if targets == "sampled" and (spec.teacher_term is None or match.ensemble != "losses"):
        raise UserError(
            f"drawn targets are unbiased only in what is linear in them; loss '{spec.name}' with ensemble "
            f"'{match.ensemble}' is not",
            where=where,
            allowed="kl and soft_ce with ensemble: losses",
            todo="make the cache with targets: top",
        )


def _check_whole(row: Row, targets: str, where: str) -> None:
    """Refuse a row that reads every column of a teacher, or the mass of columns that were not drawn."""
    if targets == "sampled" and row.selects:
        raise UserError(
            "drawn targets do not say what mass a teacher has on the student's candidates",
            where=where,
            found="positions: teachable",
            todo="make the cache with targets: top",
        )
    standardised = bool(row.match.options.get("standardise"))
    if standardised or "columns" in row.spec.needs:
        what = f"loss '{row.spec.name}'" + (" with standardise: true" if standardised else "")
        raise UserError(
            f"{what} reads every column of a teacher",
            where=where,
            found=f"a cache of {targets} targets, a few columns per token",
            todo="use a divergence (kl, jsd, ...) without standardise, or run the teacher itself",
        )
