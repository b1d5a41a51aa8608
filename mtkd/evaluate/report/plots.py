"""The figures of the report: drawn once, as PNG on white and as SVG that takes the page's text colour."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtkd.engine.jsonlines import WEIGHT
from mtkd.engine.record import write_atomic
from mtkd.evaluate.report.read import Curve, RunData, StageRecord, number
from mtkd.evaluate.report.wording import metric_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Ink of everything that is not data. In the SVG it becomes `currentColor`, so this exact value must not be data's.
INK = "#24292e"
# Readable on white and on near-black, distinct to the colour-blind; then again with another dash.
COLOURS = ("#3b82f6", "#e8743b", "#22a06b", "#a855f7", "#c99a06", "#e0457b", "#0ea5b7", "#8b95a1")
DASHES = ("-", "--", ":", "-.")

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a "$" in a name is a "$"
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.18,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    **dict.fromkeys(
        (
            "text.color",
            "axes.edgecolor",
            "axes.labelcolor",
            "axes.titlecolor",
            "xtick.color",
            "ytick.color",
            "grid.color",
        ),
        INK,
    ),
}


@dataclass(frozen=True)
class Plot:
    """A figure: its file name without suffix, what it shows, and an inline SVG element."""

    name: str
    caption: str
    svg: str


def draw_plots(run: RunData, folder: Path) -> dict[str, Plot]:
    """Every figure the data allow, by name; also written as ``folder/<name>.png``."""
    import matplotlib

    plots: dict[str, Plot] = {}
    # From the library's defaults, so that a user's matplotlibrc changes nothing.
    settings: Any = {**matplotlib.rcParamsDefault, **_STYLE, "svg.hashsalt": "mtkd"}
    del settings["backend"]  # figures are made without pyplot: PNG is Agg, SVG is SVG
    with matplotlib.rc_context(settings):
        for name, caption, figure in _figures(run):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / f"{name}.png", _png(figure))
            plots[name] = Plot(name, caption, _svg(figure, name))
    return plots


def _figures(run: RunData) -> list[tuple[str, str, Figure]]:
    figures = []
    if any(s.validation.get("loss") for s in run.stages):
        figure = _validation([s for s in run.stages if s.validation.get("loss")])
        figures.append(("validation", "Label loss on the validation split, the same measure for every stage.", figure))
    trained = [s for s in run.stages if s.curves.get("loss")]
    if trained:
        caption = (
            "Training loss of each stage, the stage's own objective: "
            "panels of different kinds of stage are not comparable. The thick line is a running mean."
        )
        figures.append(("training", caption, _training(trained)))
    for position, stage in enumerate(run.stages):
        if stage.calibration:
            caption = (
                f"Reliability of the teachers of {stage.name}: how often a teacher is right against how sure it is, "
                "before (dashed) and after calibration. On the diagonal it is as sure as it is right; above it is flat."
            )
            figures.append((f"reliability-{position + 1:02d}", caption, _reliability(stage)))
        weights = stage.per_teacher(WEIGHT)
        if weights:
            caption = "Mean weight of each teacher, and the entropy of the weights (dashed: all teachers alike)."
            figures.append(
                (f"weights-{position + 1:02d}", caption, _weights(weights, stage.curves.get("weight_entropy")))
            )
    rows = [row for row in run.comparisons if _drawable(row)]
    for metric in dict.fromkeys(row.get("metric") for row in rows):
        chosen = [row for row in rows if row.get("metric") == metric]
        caption = "Candidate minus baseline with its confidence interval; an interval across 0 shows no difference."
        figures.append((f"differences-{_plain(str(metric))}", caption, _differences(chosen, str(metric))))
    return figures


def _new(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure  # not pyplot: no global state, no window

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.ravel())


def _validation(stages: Sequence[StageRecord]) -> Figure:
    figure, (axes,) = _new(1, 1, 9, 3.6)
    for i, stage in enumerate(stages):
        curve = stage.validation["loss"]
        axes.plot(curve.steps, curve.values, marker="o", markersize=4, **_line(i))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("nats per target")
    axes.set_xlim(left=0)
    _legend(axes, [s.name for s in stages])
    return figure


def _training(stages: Sequence[StageRecord]) -> Figure:
    columns = min(3, len(stages))
    rows = math.ceil(len(stages) / columns)
    figure, panels = _new(rows, columns, 9, 2.5 * rows)
    for i, axes in enumerate(panels):
        if i >= len(stages):
            axes.set_visible(False)
            continue
        curve, colour = stages[i].curves["loss"], COLOURS[i % len(COLOURS)]
        axes.plot(curve.steps, curve.values, color=colour, linewidth=0.8, alpha=0.45)
        axes.plot(curve.steps, _running_mean(curve.values), color=colour)
        axes.set_title(stages[i].name, loc="left")
        axes.set_xlim(left=0)
        if i % columns == 0:
            axes.set_ylabel("training loss")
        if i + columns >= len(stages):
            axes.set_xlabel("optimizer step")
    return figure


def _weights(weights: dict[str, Curve], entropy: Curve | None) -> Figure:
    figure, panels = _new(1, 2 if entropy else 1, 9, 2.7)
    for i, curve in enumerate(weights.values()):
        panels[0].plot(curve.steps, curve.values, **_line(i))
    panels[0].set_ylabel("mean weight")
    panels[0].set_ylim(bottom=min(0.0, panels[0].get_ylim()[0]))
    _legend(panels[0], list(weights))
    if entropy:
        panels[1].plot(entropy.steps, entropy.values, color=COLOURS[-1])
        panels[1].axhline(math.log(len(weights)), color=INK, linewidth=1, linestyle="--")
        panels[1].set_ylabel("entropy of the weights (nats)")
        panels[1].set_ylim(0, max(panels[1].get_ylim()[1], 1.1 * math.log(len(weights))) or 1)
    for axes in panels:
        axes.set_xlabel("optimizer step")
        axes.set_xlim(left=0)
    return figure


def _reliability(stage: StageRecord) -> Figure:
    """Accuracy over mean confidence, a panel per teacher; a dot's area is its share of the labels."""
    columns = min(4, len(stage.calibration))
    rows = math.ceil(len(stage.calibration) / columns)
    figure, panels = _new(rows, columns, 2.4 * columns, 2.5 * rows)
    for axes in panels[len(stage.calibration) :]:
        axes.set_visible(False)
    for axes, (teacher, facts) in zip(panels, stage.calibration.items(), strict=False):
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8)
        for when, style, colour in (("before", "--", COLOURS[-1]), ("after", "-", COLOURS[0])):
            bins = facts[when].get("bins") if isinstance(facts.get(when), dict) else None
            bins = [each for each in bins or [] if isinstance(each, list) and len(each) == 3]
            total = sum(count for *_, count in bins) or 1
            sure, right = [each[0] for each in bins], [each[1] for each in bins]
            axes.plot(sure, right, linestyle=style, color=colour)
            axes.scatter(sure, right, s=[6 + 120 * each[2] / total for each in bins], color=colour)
        axes.set_title(_short(teacher), loc="left")
        axes.set_xlabel("confidence")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
    panels[0].set_ylabel("accuracy")
    return figure


def _differences(rows: Sequence[dict[str, Any]], metric: str) -> Figure:
    figure, (axes,) = _new(1, 1, 9, 0.9 + 0.3 * len(rows))
    colours = {True: COLOURS[2], False: COLOURS[5], None: COLOURS[-1]}
    for i, row in enumerate(rows):
        gap, low, high = (float(row[key]) for key in ("difference", "low", "high"))
        colour = colours.get(row.get("better"), COLOURS[-1])
        axes.plot([low, high], [i, i], color=colour, linewidth=2.2)
        axes.plot([gap], [i], color=colour, marker="o", markersize=6 if row.get("domain") == "overall" else 4)
    axes.axvline(0, color=INK, linewidth=1)
    labels = [f"{row.get('candidate')} {chr(8722)} {row.get('baseline')}, {row.get('domain')}" for row in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"difference in {metric_name(metric)}")
    return figure


def _line(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
    }


def _legend(axes: Axes, names: Sequence[str]) -> None:
    """Next to the axes, in the order drawn. Without handles, matplotlib drops a name that begins with "_"."""
    handles = axes.get_lines()[: len(names)]
    axes.legend(handles, [_short(n) for n in names], loc="center left", bbox_to_anchor=(1.0, 0.5))


def _short(name: str) -> str:
    return name if len(name) <= 32 else name[:31] + "…"


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean of the finite values in a window of a tenth of the curve around each point; NaN where there is none."""
    half = len(values) // 20
    means = []
    for i in range(len(values)):
        window = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means


def _drawable(row: dict[str, Any]) -> bool:
    return all((x := number(row.get(key))) is not None and math.isfinite(x) for key in ("difference", "low", "high"))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "metric"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white", bbox_inches="tight")
    return buffer.getvalue()


def _svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element: no prolog, no metadata, ids of its own, ink as `currentColor`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace(INK, "currentColor")
    # Several figures share a page: an id must not mean the first one's.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    head, body = text.split(">", 1)
    points = float(re.findall(r'viewBox="0 0 ([\d.]+)', head)[0])
    head = re.sub(r' (width|height)="[^"]*"', "", head)  # in points; the page decides, up to the natural size
    return f'{head} role="img" style="width:100%;max-width:{points * 4 / 3:.0f}px">{body}'
