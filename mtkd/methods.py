"""METHODS: the names of the literature, each a few Match rows with the equation they come from.

A mix is list concatenation. Options of a method (`method: {name: kd, options: {temperature: 4}}`) are the keyword
parameters of its function. A hard label is a row with ``target: labels``; there is no class per method.
"""

from __future__ import annotations

from mtkd.match import Layer, Match
from mtkd.registry import method


@method("kd", stages=("fine-tune", "pre-train"), source="Hinton et al. 2015, arXiv 1503.02531, section 2")
def kd(temperature: float = 1.0, soft: float = 0.5, hard: float = 0.5, loss: str = "kl") -> tuple[Match, ...]:
    """``soft * T^2 KL(p_T || p_S) + hard * CE``."""
    rows: tuple[Match, ...] = (Match(feature="logits", loss=loss, weight=soft, options={"temperature": temperature}),)
    return (*rows, _hard(hard)) if hard else rows


@method("distilbert", stages=("pre-train",), source="Sanh et al. 2019, arXiv 1910.01108, section 3")
def distilbert(
    temperature: float = 2.0, soft: float = 5.0, hard: float = 2.0, cosine: float = 1.0
) -> tuple[Match, ...]:
    """``5 T^2 KL + 2 CE_mlm + 1 (1 - cos(H^S_last, H^T_last))``; KL on the targets only, per-token mean."""
    return (
        Match(feature="logits", loss="kl", weight=soft, options={"temperature": temperature}),
        _hard(hard),
        Match(feature="hidden", loss="cosine", weight=cosine),
    )


@method(
    "tinybert",
    stages=("pre-train", "fine-tune"),
    source="Jiao et al. 2019, arXiv 1909.10351, equations 6 to 11",
    must_be_equal=("heads",),
)
def tinybert(step: str = "layers", temperature: float = 1.0) -> tuple[Match, ...]:
    """Step 'layers' (general and task distillation, equations 7 to 9) or 'prediction' (equation 10, no hard label)."""
    if step == "prediction":
        return (Match(feature="logits", loss="soft_ce", options={"temperature": temperature}),)
    if step != "layers":
        raise ValueError(f"step is 'layers' or 'prediction'; found {step!r}")
    return (
        Match(feature="embedding", loss="mse"),
        Match(feature="hidden", loss="mse", student_layer="each", teacher_layer="uniform"),
        Match(feature="scores", loss="attention_mse", student_layer="each", teacher_layer="uniform"),
    )


@method("minilmv2", stages=("pre-train",), source="Wang et al. 2020, arXiv 2012.15828, equations 2 to 5")
def minilmv2(heads: int = 48, teacher_layer: int = 0) -> tuple[Match, ...]:
    """Query, key and value relations of the student's last and a teacher's layer (0: the last; 24-layer ones: 21)."""
    layer: Layer = teacher_layer or "last"
    return tuple(
        Match(feature=feature, loss="relation_kl", teacher_layer=layer, options={"heads": heads})
        for feature in ("query", "key", "value")
    )


@method("mt_bert", stages=("fine-tune",), source="Wu et al. 2021, arXiv 2106.01023, equations 2 to 5")
def mt_bert(temperature: float = 1.0, soft: float = 1.0, hidden: float = 1.0, hard: float = 1.0) -> tuple[Match, ...]:
    """Weighted soft labels, unweighted hidden rows with one projection per (teacher, layer), and the labels."""
    rows: tuple[Match, ...] = (
        Match(feature="logits", loss="soft_ce", weight=soft, options={"temperature": temperature}),
    )
    if hidden:
        layers = Match(
            feature="hidden",
            loss="mse",
            weight=hidden,
            student_layer="each",
            teacher_layer="uniform",
            weighted=False,
            projection="per_layer",
        )
        rows = (*rows, layers)
    return (*rows, _hard(hard)) if hard else rows


def _hard(weight: float) -> Match:
    return Match(feature="logits", loss="ce", target="labels", weight=weight)
