"""Which teachers teach which texts, by domain: inside a domain an ensemble, between domains a route.

A teacher names its domains (`domain`), a text has the one that stands in its row (`data.NAME.domain`). A teacher that
names none teaches every text, and one that names `DEFAULT` every text whose domain no teacher names.

Source: one teacher per domain, on the student's own text, is multi-teacher on-policy distillation (MOPD), Xiaomi 2026,
MiMo-V2-Flash, arXiv 2601.02780; several teachers in a domain are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mtkd.config.teacher import DEFAULT_DOMAIN, TeacherConfig
from mtkd.errors import DataError, nearest

_TODO = f"correct the row or a teacher's domain, or give a teacher `domain: {DEFAULT_DOMAIN}`: it teaches all others"


@dataclass(frozen=True)
class Domains:
    """The domains that the teachers of a stage name.

    Attributes:
        names: D of them, sorted.
        teach: whether teacher k teaches texts of domain d, [D+1][T]; the last row: of any other domain.
    """

    names: tuple[str, ...]
    teach: tuple[tuple[bool, ...], ...]

    @classmethod
    def of(cls, teachers: Sequence[TeacherConfig]) -> Domains | None:
        """Those of a stage; None where no teacher names one."""
        asked = [set(teacher.domains) for teacher in teachers]
        if not any(asked):
            return None
        names = sorted(set.union(*asked) - {DEFAULT_DOMAIN})
        rows = [tuple(not own or name in own for own in asked) for name in (*names, DEFAULT_DOMAIN)]
        return cls(tuple(names), tuple(rows))

    def number(self, domain: str) -> int:
        """The row of `teach` for texts of a domain."""
        return self.names.index(domain) if domain in self.names else len(self.names)

    def check(self, rows: Iterable[tuple[str, str]], where: str) -> None:
        """Refuse texts that no teacher teaches, and domains that no text has.

        Args:
            rows: (domain, place) of each text. where: the stage's teachers.
        Raises:
            DataError: with the row, or the domain.
        """
        seen: dict[str, str] = {}
        for domain, place in rows:
            seen.setdefault(domain, place)
        for domain, place in seen.items():
            if not any(self.teach[self.number(domain)]):
                raise DataError(
                    "no teacher of the stage teaches this row's domain" if domain else "a row has no domain",
                    where=place,
                    found=domain or "nothing",
                    allowed=self.names,
                    todo=nearest(domain, self.names) or _TODO,
                )
        for name in self.names:
            if name not in seen:
                raise DataError(
                    "no training text has the domain of this teacher",
                    where=where,
                    found=f"domain: {name}",
                    allowed=sorted(filter(None, seen)),
                    todo=nearest(name, list(seen)),
                )
