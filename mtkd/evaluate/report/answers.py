"""What models wrote, as tables: scores per model, and some texts next to one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mtkd.evaluate.metrics import COUNTS, HIGHER_IS_BETTER
from mtkd.evaluate.report.read import RunData, number
from mtkd.evaluate.report.table import Cell, Table, exact_text
from mtkd.evaluate.report.wording import count_text, metric_name, value_text


@dataclass(frozen=True)
class Sample:
    """A prompt, and a table of what the data and every model answer."""

    document: str
    prompt: str
    table: Table


def answers_table(run: RunData) -> Table | None:
    """One row per model: its metrics over all prompts, then those of every domain. The best of a column is marked."""
    models = _models(run)
    if not models:
        return None
    parts = {"": "overall"} | {name: name for facts in models.values() for name in facts.get("domains") or {}}
    columns = [(part, metric) for part in parts for metric in _metrics(models, part)]
    values = {(name, column): _value(facts, *column) for name, facts in models.items() for column in columns}
    best = {}
    for column in columns:
        known = [x for name in models if (x := values[name, column]) is not None and x == x]
        best[column] = max(known) if len(known) > 1 and column[1] in HIGHER_IS_BETTER else None
    rows = []
    for name in models:
        row = [Cell(name, style="name")]
        for column in columns:
            value = values[name, column]
            style = "n best" if value is not None and value == best[column] else "n"
            row.append(Cell(value_text(value), exact_text(value), style))
        rows.append(row)
    groups = [("", 1), *((shown, len(_metrics(models, part))) for part, shown in parts.items())]
    header = ["model", *(metric_name(metric) for _, metric in columns)]
    return Table(header, rows, groups if len(parts) > 1 else [])


def answers_text(run: RunData) -> str:
    """What was answered, in words; "" where nothing was."""
    models, facts = _models(run), run.answers
    if not models:
        return ""
    documents = count_text(_value(next(iter(models.values())), "", "documents"))
    left_out = number(facts.get("left_out"))
    lost = f"; {count_text(left_out)} left out, whose answer is cut in the data" if left_out else ""
    return f"{documents} prompts of the {facts.get('split')} split of {facts.get('data')}{lost}."


def samples_of(run: RunData) -> list[Sample]:
    """Some prompts with the data's answer and every model's."""
    samples = []
    for sample in run.answers.get("samples") or []:
        if not isinstance(sample, dict):
            continue
        answers = sample.get("answers")
        texts = {"data": sample.get("reference"), **(answers if isinstance(answers, dict) else {})}
        rows = [[Cell(str(name), style="name"), Cell(str(text), style="wrap")] for name, text in texts.items()]
        samples.append(
            Sample(str(sample.get("document")), str(sample.get("prompt")), Table(["writer", "answer"], rows, []))
        )
    return samples


def _models(run: RunData) -> dict[str, dict[str, Any]]:
    models = run.answers.get("models")
    return {k: v for k, v in models.items() if isinstance(v, dict)} if isinstance(models, dict) else {}


def _metrics(models: dict[str, dict[str, Any]], part: str) -> list[str]:
    return list(dict.fromkeys(m for facts in models.values() for m in _part(facts, part) if m not in COUNTS))


def _part(facts: dict[str, Any], part: str) -> dict[str, Any]:
    found = (facts.get("domains") or {}).get(part) if part else facts.get("overall")
    return found if isinstance(found, dict) else {}


def _value(facts: dict[str, Any], part: str, metric: str) -> float | None:
    return number(_part(facts, part).get(metric))
