"""Count the memory of one optimizer step, weights aside, on tensors that have shapes and no values.

A stage's own objective and teachers are built of torch's fake tensors (any size, no memory) and make one step:
teachers, forward, tiles, backward. Every storage is followed until it is freed. So the count includes what a model
saves for its backward pass, what autocast copies and what a loss needs in between. No formula is needed for any of it.
Where the code asks for a value, the answer is that every position counts: the largest step.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtkd.data.batch import Batch
from mtkd.engine.base import Trainable
from mtkd.models.create import tapped_model
from mtkd.models.features import Features
from mtkd.models.forward import features_of, logits_of
from mtkd.models.linear import speed_up_linears
from mtkd.models.pieces import Pieces
from mtkd.models.taps import TappedModel
from mtkd.models.vocabulary import VocabularyMap
from mtkd.objective.cofinetune import CoFinetuning
from mtkd.objective.objective import Objective
from mtkd.objective.wire import Wiring, wire
from mtkd.planning.spec import ModelSpec, StageSpec
from mtkd.pool import Gives
from mtkd.pool.cache.folder import CacheFacts
from mtkd.pool.own import PluggedFacts
from mtkd.weightings.base import StageFacts, Weighting
from mtkd.weightings.constant import Uniform
from mtkd.weightings.make import make_weighting

MOMENTS = ("teachers", "forward", "loss", "backward", "update")
"""Parts of a step, in order: `forward` ends with the student's features, `loss` where the backward pass begins."""

_PARTS = ("gradients", "teachers", "activations", "rest")
_ODD = "_mtkd_any"


@dataclass(frozen=True)
class Step:
    """A stage's step on one rank.

    Attributes:
        spec: of the stage; several trained models are co-finetuned, and a cache stage has one teacher.
        sequences, length: of a micro-batch, padding included.
        micro_batches: per optimizer step.
        tile: positions.
        on_gpu: tiles are not cut for a CPU's cache.
        dtype: bfloat16 runs models under autocast.
    """

    spec: StageSpec
    sequences: int
    length: int
    micro_batches: int
    tile: int
    on_gpu: bool
    dtype: torch.dtype
    checkpointing: bool


@dataclass(frozen=True)
class Footprint:
    """Bytes of a step without weights, moments and teachers' weights, at its largest moment.

    Attributes:
        moment: one of `MOMENTS`.
        gradients: of the trained parameters, as far as they exist at that moment.
        teachers: features and temporaries of the teachers.
        activations: tensors that the student's forward leaves for the backward pass.
        rest: tiles, temporaries, gradients of activations.
        trained: the trained parameters: all gradients take as much.
        buffers: of the trained models.
        ungraded: the most of teachers, activations and rest together, at any moment.
        asked: the most while the teachers run, without gradients.
        notes: parts that are not counted, in words.
    """

    moment: str
    gradients: int
    teachers: int
    activations: int
    rest: int
    trained: int
    buffers: int
    ungraded: int
    asked: int
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Bytes at the largest moment."""
        return self.gradients + self.teachers + self.activations + self.rest


class Storages(TorchDispatchMode):
    """Follows storages of fake and real tensors, from the operation that makes them until they are freed.

    Attributes:
        live: bytes now.
        peak: the most so far; may be set back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}

    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Count these from now on, each storage once."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = id(storage), storage.nbytes()
            entry = self._known.get(key)
            if entry is not None and entry[0]() is storage:
                self.live += size - entry[1]  # it may have been resized
                self._known[key] = (entry[0], size)
                continue
            # torch keeps a storage's Python object as long as the storage itself
            self._known[key] = (weakref.ref(storage, lambda _, key=key: self._gone(key)), size)  # type: ignore[misc]
            self.live += size
        self._changed()

    def _changed(self) -> None:
        self.peak = max(self.peak, self.live)

    def _gone(self, key: int) -> None:
        self.live -= self._known.pop(key)[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.follow(x for x in tree_leaves(result) if isinstance(x, Tensor))
        return result


class _Meter(Storages):
    """Storages of a step that has no values; remembers the parts of the largest moment.

    Questions about values are answered as if every position counted and every number were one. `any` is false, since
    code asks it whether something needs special care.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.at, self.base, self.teachers, self.activations = "teachers", 0, 0, 0
        self.parts = dict.fromkeys(_PARTS, 0)
        self.moment, self.ungraded, self.asked, self.gradients = "teachers", 0, 0, 0
        self._without = {id(p) for p in parameters}  # those that have no gradient yet
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._graded)

    def _graded(self, parameter: Tensor) -> None:
        if id(parameter) in self._without and parameter.grad is not None:
            self._without.remove(id(parameter))
            self.gradients += parameter.grad.untyped_storage().nbytes()

    def begin(self) -> None:
        """Count from here on: weights and the batch are counted elsewhere."""
        self.base, self.peak, self.ungraded, self.asked = self.live, 0, 0, 0

    def footprint(self, trained: int, buffers: int) -> Footprint:
        """The counted bytes, with those of trained parameters and buffers."""
        gradients, teachers, activations, rest = (self.parts[name] for name in _PARTS)
        return Footprint(
            self.moment, gradients, teachers, activations, rest, trained, buffers, self.ungraded, self.asked
        )

    def after_forward(self) -> None:
        """Take what the student's forward left as activations, and all later storages as the rest."""
        self.activations = self.live - self.base - self.teachers - self.gradients
        self.at = "loss"

    def _changed(self) -> None:
        live = self.live - self.base
        if self.at == "teachers":
            self.asked = max(self.asked, live - self.gradients)
        if live <= self.peak and live <= self.ungraded:
            return
        gradients = self.gradients
        self.ungraded = max(self.ungraded, live - gradients)
        if live <= self.peak:
            return
        self.peak, self.moment = live, self.at
        rest = live - gradients
        if self.at == "teachers":
            self.parts = dict(zip(_PARTS, (gradients, rest, 0, 0), strict=True))
            return
        teachers = min(self.teachers, rest)
        activations = rest - teachers if self.at == "forward" else min(self.activations, rest - teachers)
        self.parts = dict(zip(_PARTS, (gradients, teachers, activations, rest - teachers - activations), strict=True))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default:
            kind = args[0].dtype
            if kind == torch.bool:
                return not hasattr(args[0], _ODD)
            return 1.0 if kind.is_floating_point else 1
        if func is aten.equal.default:
            return True
        if func is aten.nonzero.default:
            func, size = aten.zeros.default, [args[0].numel(), args[0].dim()]
            args, kwargs = (size,), {"dtype": torch.int64, "device": args[0].device}
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func is aten.any.default:
            setattr(result, _ODD, True)
        return result


def measure(step: Step, device: str = "cpu") -> Footprint:
    """Count a step.

    Args:
        device: "cpu", or "cuda" where there is one: its kernels decide which temporaries exist.
    Raises:
        Exception: the models or losses need values, so that nothing can be counted.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        if not step.spec.trained:
            return _captured(step)
        try:
            return _measured(step, _trainable(step, None))
        except Exception:
            # Some weightings read values (a solver of scipy's, say); they need little memory of their own.
            footprint = _measured(step, _trainable(step, Uniform()))
            return replace(footprint, notes=(f"weighting '{step.spec.stage.weighting.name}' is counted as uniform",))


def _measured(step: Step, objective: Trainable) -> Footprint:
    teachers = [_teacher(teacher.gives) for teacher in step.spec.teachers]
    objective.train()
    batch = _batch(step)
    parameters = [p for p in objective.parameters() if p.requires_grad]
    meter = _Meter(parameters)
    tensors = [*objective.parameters(), *objective.buffers(), *vars(batch).values()]
    for teacher in teachers:
        tensors += [*teacher.parameters(), *teacher.buffers()] if isinstance(teacher, TappedModel) else []
    counts = dict.fromkeys(("tokens", "targets", "labels", "written", "sequences"), 1)
    counts |= objective.step_counts(batch)
    for model in objective.models.values():
        model.register_forward_hook(lambda *_: meter.after_forward())
    with meter:
        meter.follow(x for x in tensors if isinstance(x, Tensor))
        meter.begin()
        # the second micro-batch meets the gradients of the first, and no later one meets more
        for _ in range(min(step.micro_batches, 2)):
            meter.at, meter.teachers, before = "teachers", 0, meter.live
            features = [_features(step, k, teacher, objective, batch) for k, teacher in enumerate(teachers)]
            meter.teachers, meter.at = meter.live - before, "forward"
            loss, metrics = objective(batch, features, counts)
            meter.at = "backward"
            loss.backward()
            del loss, metrics, features
    trained = sum(p.untyped_storage().nbytes() for p in parameters)
    buffers = sum(b.untyped_storage().nbytes() for b in objective.buffers())
    if trained > meter.peak:  # at the update all gradients are in memory, and nothing else of the step
        meter.moment, meter.parts = "update", dict(zip(_PARTS, (trained, 0, 0, 0), strict=True))
    return meter.footprint(trained, buffers)


def _captured(step: Step) -> Footprint:
    """Count a cache stage: the forward of its one teacher, and a tile of logits with its softmax and top values."""
    (spec,) = step.spec.teachers
    teacher, batch, meter = _teacher(spec.gives), _batch(step), _Meter(())
    if not isinstance(teacher, TappedModel):
        return meter.footprint(trained=0, buffers=0)  # what a plug-in does is not known
    with meter, torch.no_grad():
        meter.follow([*teacher.parameters(), *teacher.buffers(), batch.input_ids])
        meter.begin()
        logits = logits_of(teacher, batch, step.dtype)
        meter.teachers, meter.at = meter.live - meter.base, "loss"
        count = min(step.tile, step.sequences * (step.length if step.spec.token_level else 1))
        rows = logits.in_dtype(step.dtype).rows(torch.zeros(count, dtype=torch.int64))
        torch.log_softmax(rows, -1).topk(min(128, rows.shape[-1]), -1)
    return meter.footprint(trained=0, buffers=0)


def _trainable(step: Step, weighting: Weighting | None) -> Trainable:
    """The stage's objective without values."""
    spec = step.spec
    models = {name: _model(model) for name, model in spec.trained.items()}
    for model in models.values():
        speed_up_linears(model)
        if step.checkpointing:
            model.enable_activation_checkpointing()
    if len(models) > 1:
        return CoFinetuning(models, regression=bool(spec.data.regression), tile=step.tile, dtype=step.dtype)
    (student,) = models.values()
    infos = {teacher.name: teacher.info for teacher in spec.teachers}
    # teachers of one parameter each: their sizes change weights of the mixture, and no shape
    facts = StageFacts(tuple(infos), (1,) * len(infos), student.info.width, student.info.num_labels, 0)
    weighting = weighting or make_weighting(spec.stage.weighting, facts, "weighting")
    how = Wiring(spec.stage.per, spec.token_level, step.tile, step.dtype)
    return wire(student, infos, spec.rows, weighting, how, _FewPieces(step.on_gpu))


class _FewPieces(Pieces):
    """The first two and the last of equal pieces of work.

    The second piece meets the memory that the first has left behind; later ones meet no more.

    Args:
        on_gpu: do not cut tiles into chunks, even if this machine has no GPU.
    """

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu

    def starts(self, count: int, size: int) -> Sequence[int]:
        every = super().starts(count, size)
        return (*every[:2], every[-1]) if len(every) > 3 else every

    def chunks(self, rows: int, logits: Tensor) -> Iterator[slice]:
        yield from self.of(rows, rows) if self._on_gpu else super().chunks(rows, logits)


def _model(spec: ModelSpec) -> TappedModel:
    model = tapped_model(spec.config, spec.auto_class, spec.dtype)
    vocabulary = None
    if spec.kept is not None:
        ids = torch.zeros(spec.num_ids, dtype=torch.int64)  # the sizes of the map count, not its values
        vocabulary = VocabularyMap(ids[: spec.kept], ids, ids, "")
    return TappedModel(model, spec.auto_class, spec.num_ids, vocabulary)


def _teacher(gives: Gives) -> TappedModel | Gives:
    if not isinstance(gives, ModelSpec):
        return gives
    model = _model(gives).eval().requires_grad_(False)  # frozen: its forward saves nothing for a backward pass
    speed_up_linears(model)
    return model


def _features(step: Step, k: int, teacher: TappedModel | Gives, objective: Trainable, batch: Batch) -> Features:
    assert isinstance(objective, Objective)
    wants = objective.teacher_wants(k, has_logits="logits" in teacher.info.taps)
    if not isinstance(teacher, TappedModel):
        assert isinstance(teacher, CacheFacts | PluggedFacts)
        return teacher.stand_in(wants, batch)
    with torch.no_grad():
        return features_of(teacher, batch, wants, step.dtype)


def _batch(step: Step) -> Batch:
    shape = (step.sequences, step.length)
    ids = torch.zeros(shape, dtype=torch.int64)
    each = torch.zeros(step.sequences, dtype=torch.int64)
    targets = ids if step.spec.token_level else each.float() if step.spec.data.regression else each
    mask = torch.ones(shape, dtype=torch.bool)
    return Batch(each, ids, mask, targets, token_type_ids=ids, nsp_targets=each, routes=each)
