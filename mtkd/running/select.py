"""Decide by validation scores when a stage ends, and which of its steps becomes its model."""

from __future__ import annotations

from collections.abc import Iterable

from mtkd.data.batch import Batch
from mtkd.data.sampler import evaluation_batches
from mtkd.engine.folder import StageDir
from mtkd.engine.jsonlines import VALIDATION
from mtkd.engine.seal import check_seal
from mtkd.errors import DataError, UserError
from mtkd.evaluate.metrics import LOWER_IS_BETTER, summarise
from mtkd.evaluate.score import Scorer
from mtkd.running.build import BuiltStage
from mtkd.running.metrics import MetricsLog
from mtkd.running.state import TrainState


def check_selection(built: BuiltStage) -> None:
    """Check the split and the metric by which the stage selects, which the plan cannot see without the data.

    Raises:
        UserError: one of them is missing.
    """
    metric, data = built.stage.selects, built.data
    if not metric:
        return
    if data.splits.get("validation") is None:
        raise DataError(
            "there is no validation split to choose by",
            where=f"stages.{built.name}",
            found=", ".join(data.splits),
            todo="set data.validation_share, or drop early_stop and export: best",
        )
    allowed = ("loss", *data.task.metrics_for(data.num_labels))
    if metric not in allowed:
        raise UserError("these data have no such metric", where=f"stages.{built.name}", found=metric, allowed=allowed)


def validate(built: BuiltStage, log: MetricsLog, step: int) -> float:
    """Log the scores on the validation split; the student's random state is untouched.

    The scores are the label loss (nats per target) and the metric by which the stage selects. A collective.

    Returns:
        That metric, the same on every rank; the loss when the stage selects by nothing, NaN without a split.
    """
    split = built.data.splits.get("validation")
    if split is None or not split.has_targets:
        return float("nan")
    engine, objective, dist = built.engine, built.objective, built.engine.dist
    models, metric = list(objective.models.values()), built.stage.selects or "loss"
    objective.eval()

    def batches() -> Iterable[Batch]:
        return evaluation_batches(split, built.stage.batch, dist.rank, dist.world_size)

    scorer = Scorer(engine.device, objective.dtype, dist, objective.tile, engine.whole_head)
    values = {"loss": _mean([scorer.mean_loss(model, batches()) for model in models])}
    if metric != "loss":
        task = built.data.config.task
        records = [scorer.records([model], built.data, split, batches()) for model in models]
        values |= {metric: _mean([summarise(task, scored)[metric] for scored in records if scored is not None])}
    objective.train()
    log.log(step, {VALIDATION + name: value for name, value in values.items()})
    return dist.broadcast_object(values[metric])  # all ranks must stop and save alike


def note_score(built: BuiltStage, state: TrainState, value: float) -> bool:
    """Note a validation score in the state; true if the step must be kept as the best so far.

    An equal score is not better, NaN never is. After `patience` scores in a row that are not, `state.ended` says so.
    """
    stage = built.stage
    if not stage.selects:
        return False
    sign = 1 if stage.selects in LOWER_IS_BETTER else -1
    if value == value and (state.best_value is None or sign * value < sign * state.best_value):
        state.best_step, state.best_value, state.waited = state.step, value, 0
        return stage.export == "best"  # only then is its checkpoint read again
    state.waited += 1
    if stage.early_stop is not None and state.waited >= stage.early_stop.patience and state.step < built.steps:
        state.ended = (
            f"early stop: {stage.selects} was not better than {_number(state.best_value)} of step {state.best_step} "
            f"in {state.waited} evaluations"
        )
    return False


def take_best(built: BuiltStage, folder: StageDir, state: TrainState) -> int:
    """Load the step to export into the engine, unless it is the last one, and return it. A collective.

    Raises:
        DataError: no score was a number, or the checkpoint of the best step is not whole.
    """
    if built.stage.export == "last" or state.best_step == state.step:
        return state.step
    if state.best_step == 0:
        raise DataError(
            "no validation score was a number, so none of them is the best",
            where=f"stages.{built.name}",
            found=built.stage.selects,
            todo="choose another export_metric, or export: last",
        )
    best = folder.checkpoints / f"step-{state.best_step:06d}"
    problem = ""
    if built.engine.dist.is_main:
        try:
            check_seal(best)
        except DataError as error:
            problem = str(error)
    problem = built.engine.dist.broadcast_object(problem)  # all ranks raise: `load` would wait for the main one
    if problem:
        raise DataError(
            "the checkpoint of the best step is not whole",
            where=f"stages.{built.name}",
            found=problem,
            todo=f"train the stage again: --redo {built.name}",
        )
    built.engine.load(best)
    return state.best_step


def _mean(values: list[float]) -> float:
    """The mean, NaN for no values: only the main rank has scores, and broadcasts them."""
    return sum(values) / len(values) if values else float("nan")


def _number(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.6g}"
