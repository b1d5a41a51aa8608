"""METHODS: the names of the literature, each a few labelled Match rows with the equation they come from.

A method is a function from its options to rows, ``{label: Match}``; a mix is a union of such dictionaries. Options
(`method: {name: kd, options: {temperature: 4}}`) are the function's keyword parameters; a row of weight 0 is left out.
A method of several steps has the option ``step``: ``pre-train`` (on plain text), ``fine-tune`` (on the task's texts) or
``prediction`` (the task's labels, soft or hard); its default follows the stage's task. A hard label is a row with
``target: labels``; there is no class per method.
"""

from __future__ import annotations

from collections.abc import Mapping

from mtkd.config.match import ATTENTION_FEATURES, Layer, Match
from mtkd.methods.spec import method

Rows = dict[str, Match]

PRE_TRAIN, FINE_TUNE, PREDICTION = "pre-train", "fine-tune", "prediction"


@method("kd", steps=(FINE_TUNE,), source="Hinton et al. 2015, arXiv 1503.02531, section 2")
def kd(
    temperature: float = 1.0, soft: float = 0.5, hard: float = 0.5, loss: str = "kl", standardise: bool = False
) -> Rows:
    """``soft * T^2 KL(p_T || p_S) + hard * CE``; with `standardise` of z-scores of the logits (arXiv 2403.01427).

    With z-scores the paper has a base temperature of 2 and a larger weight, as its terms are small.
    """
    more = {"standardise": True} if standardise else {}
    return _kept({"soft": _soft(loss, soft, temperature, **more), "hard": _labels(hard)})


@method("dkd", steps=(FINE_TUNE,), source="Zhao et al. 2022, arXiv 2203.08679, equation 7")
def dkd(
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    soft: float = 1.0,
    hard: float = 1.0,
    standardise: bool = False,
) -> Rows:
    """``soft * T^2 (alpha TCKD + beta NCKD) + hard * CE``; the target is the label, or else the teacher's choice.

    Defaults are its code's for CIFAR-100, without the warm-up of the soft term over 20 epochs; `standardise`: see `kd`.
    """
    more = {"alpha": alpha, "beta": beta, **({"standardise": True} if standardise else {})}
    return _kept({"soft": _soft("dkd", soft, temperature, **more), "hard": _labels(hard)})


@method("dist", steps=(FINE_TUNE,), source="Huang et al. 2022, arXiv 2205.10536, equation 10")
def dist(temperature: float = 1.0, inter: float = 2.0, intra: float = 2.0, hard: float = 1.0) -> Rows:
    """``hard * CE + T^2 (inter (1 - r per example) + intra (1 - r per class))``, r Pearson's correlation.

    The paper's weights; temperature 1 on ImageNet, 4 on CIFAR-100. `intra` is over the examples of a micro-batch: see
    the loss `dist_intra`. Targets that are tokens have no such batch: there, ``intra: 0``.
    """
    rows = {"inter": _soft("dist_inter", inter, temperature), "intra": _soft("dist_intra", intra, temperature)}
    return _kept({**rows, "hard": _labels(hard)})


@method("pd", steps=(PRE_TRAIN, FINE_TUNE), source="Turc et al. 2019, arXiv 1908.08962, section 3")
def pd(step: str = PRE_TRAIN, loss: str = "kl") -> Rows:
    """Pre-trained distillation: pre-train on the language model's labels alone, then ``KL(p_T || p_S)``, T = 1.

    The first step asks nothing of a teacher: a stage of ``kind: finetune`` is the same without loading one.
    """
    return {"mlm": _labels(1.0)} if step == PRE_TRAIN else {"soft": _soft(loss, 1.0, 1.0)}


@method(
    "pkd",
    steps=(FINE_TUNE,),
    source="Sun et al. 2019, arXiv 1908.09355, equations 7 and 8",
    must_be_equal=("hidden width",),
    variants=({"layers": "skip"}, {"layers": "last"}),
)
def pkd(
    layers: str = "skip",
    temperature: float = 10.0,
    alpha: float = 0.5,
    beta: float = 100.0,
    sum_over_width: bool = False,
) -> Rows:
    """``(1-a) CE + a T^2 KL + b mean_k mse(n(H^S_k[CLS]), n(H^T_m(k)[CLS]))``, k = 1..L_S-1, n() = L2 normalisation.

    Layers: ``skip`` maps m(k) = k L_T/L_S (12 -> 6: 2,4,6,8,10), ``last`` maps m(k) = L_T-L_S+k (7..11). The paper sums
    the squares over the width (``sum_over_width: true``), its code takes their mean, to which b = 100 belongs: a factor
    H. The rule takes the mean over layers; the teacher weights, where there are several, apply to it too. The authors'
    code also takes the mean of the soft term over the classes (KLDivLoss's default): its T^2 KL is smaller by the
    number of classes than the paper's, which is the one here; `alpha` of that code means another balance.
    """
    if layers not in ("skip", "last"):
        raise ValueError(f"layers is 'skip' or 'last'; found {layers!r}")
    patient = Match(
        feature="cls",
        loss="normalized_mse",
        weight=beta,
        student_layer="each",
        teacher_layer="skip" if layers == "skip" else "last",
        layer_reduction="mean",
        options={"sum_over_width": sum_over_width},
    )
    return _kept({"soft": _soft("kl", alpha, temperature), "hard": _labels(1 - alpha), "patient": patient})


@method(
    "distilbert",
    steps=(PRE_TRAIN,),
    source="Sanh et al. 2019, arXiv 1910.01108, section 3",
    must_be_equal=("hidden width",),
)
def distilbert(temperature: float = 2.0, soft: float = 5.0, hard: float = 2.0, cosine: float = 1.0) -> Rows:
    """``5 T^2 KL + 2 CE_mlm + 1 (1 - cos(H^S_last, H^T_last))``; KL on the targets only, per-token mean."""
    return _kept(
        {
            "soft": _soft("kl", soft, temperature),
            "mlm": _labels(hard),
            "cosine": Match(feature="hidden", loss="cosine", weight=cosine),
        }
    )


@method(
    "minilm",
    steps=(PRE_TRAIN,),
    source="Wang et al. 2020, arXiv 2002.10957, equations 3 to 6",
    must_be_equal=("heads",),
)
def minilm() -> Rows:
    """``KL(P^T || P^S) + KL(VR^T || VR^S)`` of the last layers, ``VR = softmax(V V^T / sqrt(d))`` per head."""
    return {"probs": _probs(), "value": _relation("value", heads=0)}


@method("minilmv2", steps=(PRE_TRAIN,), source="Wang et al. 2020, arXiv 2012.15828, equations 2 to 5")
def minilmv2(heads: int = 48, teacher_layer: int = 0) -> Rows:
    """Query, key and value relations of the student's last and a teacher's layer (0: the last; 24-layer ones: 21)."""
    return {feature: _relation(feature, heads, teacher_layer) for feature in ("query", "key", "value")}


@method(
    "tinybert",
    steps=(PRE_TRAIN, FINE_TUNE, PREDICTION),
    source="Jiao et al. 2019, arXiv 1909.10351, equations 6 to 11",
    must_be_equal=("heads",),
)
def tinybert(step: str = PRE_TRAIN, temperature: float = 1.0) -> Rows:
    """Layers in general (pre-train) and task (fine-tune) distillation, equations 7 to 9; then soft labels, equation 10.

    ``sum_{k=0..L_S} mse(W H^S_k, H^T_m(k)) + sum_{k=1..L_S} mse(A^S_k, A^T_m(k))``, m(k) = k L_T/L_S; one W for the
    embedding and one for the layers, where widths differ. Prediction: ``-sum_c p_T(c) log p_S(c)``, no hard label; with
    a temperature both sides are divided by it, and there is no T^2, in paper and code.
    """
    if step == PREDICTION:
        return {"soft": _plain_soft(1.0, temperature)}
    return {"embedding": _embedding(), "hidden": _hidden(), "scores": _scores()}


@method(
    "mixbaseline",
    steps=(PRE_TRAIN, FINE_TUNE, PREDICTION),
    source="the union of PKD, DistilBERT, MiniLM, MiniLMv2 and TinyBERT (arXiv 1908.09355, 1910.01108, 2002.10957, "
    "2012.15828, 1909.10351)",
    must_be_equal=("heads",),
)
def mixbaseline(
    step: str = PRE_TRAIN,
    pre_train_temperature: float = 2.0,
    pre_train_soft: float = 5.0,
    mlm: float = 2.0,
    temperature: float = 10.0,
    alpha: float = 0.5,
    heads: int = 0,
) -> Rows:
    """Every feature of the table at once, each as its own method has it, weight 1; DistilBERT's and PKD's label terms.

    Pre-train: all layers and attentions, ``5 T^2 KL + 2 CE_mlm`` with T = 2. Fine-tune: the layers and attentions.
    Prediction: ``a T^2 KL + (1-a) CE`` with T = 10, a = 0.5. Relation heads are the models' own (``heads: 0``): they
    are equal here anyway, and 48 would refuse narrow students.
    """
    if step == PREDICTION:
        return _kept({"soft": _soft("kl", alpha, temperature), "hard": _labels(1 - alpha)})
    layers = {"embedding": _embedding(), "hidden": _hidden(), "scores": _scores(), "probs": _probs()}
    layers |= {feature: _relation(feature, heads) for feature in ("query", "key", "value")}
    if step == FINE_TUNE:
        return layers
    return _kept({**layers, "soft": _soft("kl", pre_train_soft, pre_train_temperature), "mlm": _labels(mlm)})


@method(
    "best_mix",
    steps=(PRE_TRAIN, FINE_TUNE, PREDICTION),
    source="Mixbaseline's ablation: no attention in either stage, no hard label in fine-tuning (rows of arXiv "
    "1910.01108, 1909.10351, 1908.09355)",
)
def best_mix(
    step: str = PRE_TRAIN,
    pre_train_temperature: float = 2.0,
    pre_train_soft: float = 5.0,
    mlm: float = 2.0,
    temperature: float = 10.0,
) -> Rows:
    """`mixbaseline` without scores, probs, query, key and value, and without the hard label of the prediction step."""
    whole = mixbaseline(step, pre_train_temperature, pre_train_soft, mlm, temperature, alpha=1.0)
    return {label: row for label, row in whole.items() if row.feature not in ATTENTION_FEATURES}


@method(
    "glmd",
    steps=(PRE_TRAIN, FINE_TUNE, PREDICTION),
    source="Tan et al. 2023, GLMD, arXiv 2306.06625",
)
def glmd(step: str = PRE_TRAIN, temperature: float = 15.0, prediction_temperature: float = 1.0, top: int = 0) -> Rows:
    """``T^2 KL`` on the logits of every unpadded position, the prompt's too; then soft CE on the class logits, T = 1.

    The first two steps are on token logits (a language model's data), the third on a classifier's; at another
    `prediction_temperature` it has no T^2, as in paper and code. ``top: n`` compares the teacher's n most probable
    tokens, the others as one bucket; see the loss `kl`.
    """
    if step == PREDICTION:
        return {"soft": _plain_soft(1.0, prediction_temperature)}
    options: dict[str, float] = {"temperature": temperature, **({"top": top} if top else {})}
    return {"soft": Match(feature="logits", loss="kl", positions="all", options=options)}


@method("mt_bert", steps=(FINE_TUNE,), source="Wu et al. 2021, arXiv 2106.01023, equations 2 to 5")
def mt_bert(temperature: float = 1.0, soft: float = 1.0, hidden: float = 1.0, hard: float = 1.0) -> Rows:
    """Weighted soft labels, unweighted hidden rows with one projection per (teacher, layer), and the labels.

    ``soft * sum_k w_k CE(p_k, p_S) + hidden * sum_k sum_l mse + hard * CE(y, p_S)``; with a temperature both sides of
    the soft labels are divided by it, and there is no T^2, in paper and code. w_k is the stage's `weighting`; the
    paper's is `mt_bert`.
    """
    layers = Match(
        feature="hidden",
        loss="mse",
        weight=hidden,
        student_layer="each",
        teacher_layer="uniform",
        weighted=False,
        projection="per_layer",
    )
    return _kept({"soft": _plain_soft(soft, temperature), "hidden": layers, "hard": _labels(hard)})


def _kept(rows: Mapping[str, Match]) -> Rows:
    """The rows that count at all."""
    return {label: row for label, row in rows.items() if row.weight > 0}


def _soft(loss: str, weight: float, temperature: float, **more: float) -> Match:
    return Match(feature="logits", loss=loss, weight=weight, options={"temperature": temperature, **more})


def _plain_soft(weight: float, temperature: float) -> Match:
    """Soft labels of a paper without T^2: their gradient shrinks with 1/T."""
    return Match(feature="logits", loss="soft_ce", weight=weight, options={"temperature": temperature, "scale": False})


def _labels(weight: float) -> Match:
    return Match(feature="logits", loss="ce", target="labels", weight=weight)


def _embedding() -> Match:
    return Match(feature="embedding", loss="mse")


def _hidden() -> Match:
    return Match(feature="hidden", loss="mse", student_layer="each", teacher_layer="uniform")


def _scores() -> Match:
    return Match(feature="scores", loss="attention_mse", student_layer="each", teacher_layer="uniform")


def _probs() -> Match:
    return Match(feature="probs", loss="attention_kl")


def _relation(feature: str, heads: int, teacher_layer: int = 0) -> Match:
    """A self-relation of the last layers; `teacher_layer` 0 is the last, `heads` 0 the model's own."""
    layer: Layer = teacher_layer or "last"
    options = {"heads": heads} if heads else {}
    return Match.model_validate({"feature": feature, "loss": "relation_kl", "teacher_layer": layer, "options": options})
