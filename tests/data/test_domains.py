"""Teachers of a domain: from the column of the data to the batch, and what it is told when a name is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from data_examples import sentences

from mtkd.config.teacher import teacher_config
from mtkd.data.domains import Domains
from mtkd.data.load import LoadedData
from mtkd.errors import DataError

Loader = Callable[..., LoadedData]


def of(*domains: str | list[str] | None) -> Domains | None:
    """Those of teachers t0, t1, ..."""
    return Domains.of(
        [teacher_config({"model": f"m{k}", **({"domain": d} if d is not None else {})}) for k, d in enumerate(domains)]
    )


def test_who_teaches_what() -> None:
    """Law: inside its domains a teacher teaches, without any everywhere, and `default` what no teacher names."""
    found = of("law", ["code", "law"], "default", None)
    assert found == Domains(
        ("code", "law"), ((False, True, False, True), (True, True, False, True), (False, False, True, True))
    )
    assert [found.number(name) for name in ("code", "law", "news", "")] == [0, 1, 2, 2]
    assert of(None, None) is None


def test_every_example_carries_the_number_of_its_domain(load: Loader) -> None:
    """Long texts make several examples each; a row without a domain is one of no domain, null or blank."""
    columns = {"text": sentences(5, longest=40), "kind": ["law", "code", None, "news", ""]}
    split = load(columns, domain="kind", max_length=16).splits["train"]
    found = of("law", "code", "default")
    assert found is not None
    routed = split.in_domains(found, "here")
    every = list(range(len(split)))
    wanted = [[1, 0, 2, 2, 2][document] for document in split.documents]
    assert routed.collate(every, size=len(every) + 1).routes.tolist() == [*wanted, -1]


@pytest.mark.parametrize(
    ("domains", "texts"),
    [
        (("law", "code"), ("no teacher of the stage teaches", "row 'train:3'", "cod", "did you mean 'code'?")),
        (
            ("law", "code", "default"),
            ("no training text has the domain", "stages.s.teachers", "code", "'cod'?"),
        ),
        (("law", "cod", "nws"), ("no teacher of the stage teaches", "row 'train:2'", "news", "'nws'?")),
        (("law", "cod", "news"), ("a row has no domain", "row 'train:4'", "domain: default")),
    ],
)
def test_a_name_that_fits_nothing_is_refused(load: Loader, domains: tuple[str, ...], texts: tuple[str, ...]) -> None:
    columns = {"text": sentences(4), "kind": ["law", "news", "cod", ""]}
    split = load(columns, domain="kind").splits["train"]
    found = of(*domains)
    assert found is not None
    if "default" not in domains and domains[1] == "code":
        columns = {"text": sentences(3), "kind": ["law", "law", "cod"]}
        split = load(columns, domain="kind").splits["train"]
    with pytest.raises(DataError) as caught:
        split.in_domains(found, "stages.s.teachers")
    for text in texts:
        assert text in str(caught.value)


@pytest.mark.parametrize("domain", ["", [], ["a", "a"], ["a", " "]])
def test_a_teacher_names_each_domain_once(domain: str | list[str]) -> None:
    """`[]` says nothing, so the teacher teaches every text."""
    if domain == []:
        assert teacher_config({"model": "m", "domain": domain}).domains == ()
        return
    with pytest.raises(ValueError, match="names each domain"):
        teacher_config({"model": "m", "domain": domain})
