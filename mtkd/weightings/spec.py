"""A registered weighting: its class, the laws it keeps, and what it reads; `WEIGHTINGS` holds all of them.

    mtkd.WEIGHTINGS["fixed"](teachers=("a", "b"), weights={"a": 3.0, "b": 1.0})      a `Weighting`
    mtkd.WEIGHTINGS["learned"].reads({"gate": "pooled"}, 2)                          its `Reads`; nothing is constructed

Options are keywords, named as in the YAML; an unknown one is refused with the nearest known name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mtkd.errors import UserError
from mtkd.registry import Decorated, Registry, check_options
from mtkd.weightings.base import ReadsRule, Weighting, names_of
from mtkd.weightings.traits import FACTS, TRAITS

GIVEN = ("teachers", "facts")
"""Parameters of a weighting's constructor that mtkd fills in: the teachers' names; the stage's `StageFacts`."""


@dataclass(frozen=True)
class Reads:
    """The names that a weighting reads, and the kind of weights it gives.

    Attributes:
        names: of `TRAITS` and `FACTS`.
        labels: the weights depend on labels.
        per_token: the weighting can give a weight per token.
        declared: the decorator names everything. Otherwise a trial found the traits, and more may be read in training.
    """

    names: frozenset[str]
    labels: bool
    per_token: bool
    declared: bool

    @property
    def traits(self) -> frozenset[str]:
        """What every teacher must have, a cached one too: traits that are read, and what facts are made of."""
        made_of = (FACTS[name].traits for name in self.names & FACTS.keys())
        return frozenset(self.names & TRAITS.keys()).union(self.text, *made_of)

    @property
    def text(self) -> frozenset[str]:
        """The facts that causal language models alone have; see `Fact.text`."""
        return frozenset(name for name in self.names & FACTS.keys() if FACTS[name].text)

    @property
    def predictions(self) -> bool:
        """Whether the teachers' predictions are read, so that each needs a trained head."""
        return not self.declared or bool(self.traits) or any(FACTS[n].teachers for n in self.names & FACTS.keys())


@dataclass(frozen=True)
class WeightingSpec:
    """A weighting class and what it declares.

    Attributes:
        sums_to_one: over the teachers, at every position.
        needs_labels: the weights depend on labels.
        negative: a weight may be negative: then a teacher is one to move away from.
        asks: names of `TRAITS` and `FACTS` that it reads, or a rule that gives them; None: not declared.
        token_rule: ``options -> bool``, whether it can give a weight per token; None: that of the class it extends,
            else the class's `per_token`.
    """

    name: str
    cls: type
    sums_to_one: bool = True
    needs_labels: bool = False
    negative: bool = False
    asks: tuple[str, ...] | ReadsRule | None = None
    token_rule: Callable[[Mapping[str, Any]], bool] | None = None

    def reads(self, options: Mapping[str, Any], num_teachers: int) -> Reads | None:
        """Its `Reads` with these options; None without a declaration: `mtkd.weightings.make` then tries it."""
        if self.asks is None:
            return None
        names = names_of(self.asks, options, num_teachers)
        return Reads(names, self.needs_labels, self.per_token(options), declared=True)

    def per_token(self, options: Mapping[str, Any], weighting: Weighting | None = None) -> bool:
        """Whether it can give a weight per token.

        Args:
            weighting: made with these options, where there is one: its constructor may know better.
        """
        weighting_class: type[Weighting] = self.cls
        rule = self.token_rule or weighting_class.declared_per_token
        by_options = weighting_class.per_token if rule is None else rule(options)
        return by_options and (weighting is None or weighting.per_token)

    def options(self) -> dict[str, inspect.Parameter]:
        """The parameters of its constructor that a stage may set; those of `GIVEN` come from mtkd."""
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)  # not nn.Module's *args
        parameters = inspect.signature(self.cls).parameters
        return {n: p for n, p in parameters.items() if n not in GIVEN and p.kind in kinds}

    def __call__(self, **named: Any) -> Any:
        """The weighting, of these options; `teachers` (names) and `facts` (`StageFacts`) where it asks for them.

        Raises:
            UserError: a keyword that is no option of it, or of the wrong type, or one of the two that it lacks.
        """
        where = f"weighting '{self.name}'"
        asked = [name for name in GIVEN if name in inspect.signature(self.cls).parameters]
        check_options({n: v for n, v in named.items() if n not in asked}, self.options(), where)
        if missing := [name for name in asked if name not in named]:
            raise UserError(
                "it is made for the teachers of a stage",
                where=where,
                found=f"no {' and no '.join(missing)}",
                todo="give teachers=(names, in order), or facts=mtkd.weightings.StageFacts(...)",
            )
        return self.construct(named)

    def construct(self, named: Mapping[str, Any]) -> Any:
        """The weighting of these checked keywords, with what the decorator declares."""
        weighting = self.cls(**named)
        weighting.negative, weighting.needs_labels = self.negative, self.needs_labels
        weighting.sums_to_one = self.sums_to_one or vars(weighting).get("sums_to_one", False)
        reads = self.reads(named, num_teachers=2)  # one teacher alone reads no more than two
        weighting.served_names = weighting.may_read(named) if reads is None else reads.names
        return weighting


WEIGHTINGS: Registry[WeightingSpec] = Registry("weighting", "mtkd.weightings")


def weighting(
    name: str,
    *,
    sums_to_one: bool = True,
    needs_labels: bool = False,
    negative: bool = False,
    reads: Collection[str] | ReadsRule | None = None,
    per_token: Callable[[Mapping[str, Any]], bool] | None = None,
) -> Callable[[Decorated], Decorated]:
    """Register a `Weighting` class under `name`; see `WeightingSpec` for the flags.

    Args:
        reads: `WeightingSpec.asks`.
        per_token: `WeightingSpec.token_rule`.

    Raises:
        ValueError: `reads` is one text: its letters would be taken for names.
    """
    if isinstance(reads, str):
        raise ValueError(f"weighting '{name}': reads is a tuple of names; found {reads!r}")
    asks = reads if reads is None or callable(reads) else tuple(reads)

    def decorate(cls: Decorated) -> Decorated:
        # On the class, where a class that extends it and an instance that Python code makes find it.
        if asks is not None:
            cls.declared_reads = asks  # type: ignore[attr-defined]
        if per_token is not None:
            cls.declared_per_token = per_token  # type: ignore[attr-defined]
        spec = WeightingSpec(name, cls, sums_to_one, needs_labels, negative, asks, per_token)  # type: ignore[arg-type]
        WEIGHTINGS.add(name, spec)
        return cls

    return decorate


def among(*names: str) -> ReadsRule:
    """A rule: these are read where there are several teachers; one alone has the weight 1 for any prediction."""
    return lambda options, num_teachers: names if num_teachers > 1 else ()
