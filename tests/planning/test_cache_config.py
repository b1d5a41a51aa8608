"""What is refused of cache stages and cached teachers before anything is loaded, and how the message leads on."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import cache_runs
import pytest
from cache_runs import EXACT
from transformers import BertConfig

from mtkd.config import CacheConfig
from mtkd.config.read import load_config
from mtkd.errors import UserError
from mtkd.models.info import CLASSIFIER, model_info
from mtkd.planning.caches import bytes_per_token, content_of
from mtkd.planning.plan import plan
from mtkd.pool.cache import CacheContent
from mtkd.pool.cache.folder import CacheFacts


def message(folder: Path, *overrides: str, cache: dict[str, Any] | None = None, **student: Any) -> str:
    """Why a plan is refused."""
    made = cache_runs.values(folder, cache=EXACT if cache is None else cache, student=student)
    file = cache_runs.write(folder, made)
    with pytest.raises(UserError) as caught:
        plan(load_config(file, overrides))
    return re.sub(r"\s+", " ", str(caught.value))


@pytest.mark.parametrize(
    ("override", "texts"),
    [
        ("stages.cache.steps=5", ("trains nothing", "drop steps")),
        ("stages.cache.optimizer={lr: 1.0e-3}", ("drop optimizer",)),
        ("stages.cache.student={architecture: gpt2, layers: 1, width: 8, heads: 2}", ("drop student",)),
        ("stages.cache.method=kd", ("drop method",)),
        ("stages.cache.teachers=[]", ("needs `teachers`",)),
        ("stages.cache.batch={sequences: 4, accumulate: 2}", ("batch.accumulate", "no optimizer steps")),
        ("stages.student.cache={k: 5}", ("kind: cache", "backend: cached")),
        ("stages.student.teachers.0.backend=resident", ("is a cache of a teacher's outputs", "backend: cached")),
        ("stages.live.teachers.0.backend=cached", ("makes a model", "kind: cache")),
        ("stages.student.teachers.0.model=stage:cache/nobody", ("its caches are: stage:cache/teacher",)),
        ("stages.student.teachers.0.model=stage:cache", ("its caches are: stage:cache/teacher",)),
        ("stages.student.student=stage:cache/teacher", ("not a model",)),
        ("stages.student.teachers.0.model={path: 'stage:cache/teacher', keep_layers: [1]}", ("as it was written",)),
        ("evaluate.ensembles=[student]", ("read from a cache", "name cache instead")),
        ("evaluate.stages=[cache]", ("is a cache, not a model", "evaluate.ensembles")),
        ("stages.cache.cache.hidden=[probs.1]", ("not kept in a cache", "hidden.K")),
        ("stages.cache.cache.hidden=[hidden.2]", ("no such layer", "hidden.2")),
        ("stages.cache.cache.k=301", ("k", "301", "at most the 300 columns")),
        ("stages.cache.cache={targets: sampled, bits: 8}", ("bits is for targets: top",)),
        ("stages.cache.cache={proposal: 1.2}", ("proposal is for targets: sampled",)),
        ("stages.live.match=[{feature: query, loss: relation_kl, options: {heads: 2}}]", ()),
    ],
)  # fmt: skip
def test_refused_configurations(override: str, texts: tuple[str, ...], tmp_path: Path) -> None:
    if not texts:  # the same row is fine where the teachers are live
        plan(load_config(cache_runs.write(tmp_path, cache_runs.values(tmp_path, cache=EXACT, student={})), [override]))
        return
    found = message(tmp_path, override)
    for text in texts:
        assert text in found, found


def test_a_feature_that_is_not_cached(tmp_path: Path) -> None:
    found = message(tmp_path, match=[{"feature": "hidden", "loss": "mse"}])
    for text in ("'hidden.1' of teacher 'teacher' is not in its cache", "add hidden.1 to `hidden`", "stages.cache"):
        assert text in found


def test_attention_is_never_cached(tmp_path: Path) -> None:
    row = {"feature": "query", "loss": "relation_kl", "options": {"heads": 2}}
    made = cache_runs.values(tmp_path, cache=EXACT, student={})
    made["stages"]["student"]["match"] = [row]
    with pytest.raises(UserError, match="is not in its cache") as caught:
        plan(cache_runs.config(tmp_path, made))
    assert "resident" in caught.value.todo


def test_another_temperature(tmp_path: Path) -> None:
    found = message(tmp_path, method={"name": "kd", "options": {"temperature": 2.0}})
    assert "temperature" in found
    assert "2" in found
    assert "cache of teacher 'teacher'" in found


def test_every_position_is_more_than_the_cache_has(tmp_path: Path) -> None:
    assert "positions: all" in message(tmp_path, method=None, match=[{"positions": "all"}])


def test_vectors_of_logits_are_not_cached(tmp_path: Path) -> None:
    assert "mse" in message(tmp_path, method=None, match=[{"loss": "mse"}])


def test_a_trait_that_the_cache_lacks(tmp_path: Path) -> None:
    for weighting, trait in (("ca_mkd", "ce"), ("entropy", "entropy")):
        found = message(tmp_path, weighting=weighting)
        assert f"reads the trait '{trait}'" in found
        assert "add it to `traits`" in found
        values = cache_runs.values(tmp_path, cache={**EXACT, "traits": [trait]}, student={"weighting": weighting})
        plan(cache_runs.config(tmp_path, values))


def test_the_text_that_the_cache_lacks(tmp_path: Path) -> None:
    """`posterior` asks for the trait; with it the plan has 4 bytes more per token, and only causal texts have it."""
    student, cache = {"weighting": "posterior", "per": "token"}, {**EXACT, "traits": ["token_log_probs"]}
    found = message(tmp_path, **student)
    assert "reads the trait 'token_log_probs'" in found
    assert "add it to `traits`" in found
    sizes = []
    for each, weighed in (cache, student), (EXACT, {}):
        text = str(plan(cache_runs.config(tmp_path, cache_runs.values(tmp_path, cache=each, student=weighed))))
        sizes.append(int(re.findall(r"<= (\d+) bytes per token", text)[0]))
    assert sizes[0] - sizes[1] == 4
    made = cache_runs.values(tmp_path, cache=cache, student={})
    made["data"]["text"] |= {"task": "masked-lm", "redraw": False}
    for stage in made["stages"].values():
        if "student" in stage:
            stage["student"]["architecture"] = "bert"
    with pytest.raises(UserError, match="only causal language models say") as caught:
        plan(cache_runs.config(tmp_path, made))
    assert caught.value.where == "stages.cache.cache.traits"


@pytest.mark.parametrize("trait", ["token_log_probs", "entropy"])
def test_a_stored_trait_is_not_that_of_a_teacher_calibrated_later(tmp_path: Path, trait: str) -> None:
    """Refused where the cache is read, taken where it is made."""
    student = {"weighting": "posterior" if trait == "token_log_probs" else "entropy", "per": "token"}
    made = cache_runs.values(tmp_path, cache={**EXACT, "traits": [trait]}, student=student)
    made["stages"]["student"]["teachers"] = [{**t, "calibrate": {"temperature": 0.5}} for t in cache_runs.CACHED]
    with pytest.raises(UserError, match="of every teacher, which the cache"):
        plan(cache_runs.config(tmp_path, made))
    made["stages"]["student"]["teachers"] = cache_runs.CACHED
    for stage in "cache", "live":
        made["stages"][stage]["teachers"] = [{**t, "calibrate": {"temperature": 0.5}} for t in cache_runs.LIVE]
    plan(cache_runs.config(tmp_path, made))


def test_traits_of_another_temperature_are_not_known(tmp_path: Path) -> None:
    warm = {**EXACT, "temperature": 2.0}
    method = {"name": "kd", "options": {"temperature": 2.0}}
    assert "'confidence'" in message(tmp_path, cache=warm, method=method, weighting="confidence")
    plan(cache_runs.config(tmp_path, cache_runs.values(tmp_path, cache=EXACT, student={"weighting": "confidence"})))


def test_a_margin_needs_two_columns(tmp_path: Path) -> None:
    found = message(tmp_path, cache={**EXACT, "k": 1}, weighting="margin")
    assert "add it to `traits` of the cache (stages.cache), keep k: 2 or more, or choose" in found
    warm = message(tmp_path, cache={**EXACT, "k": 1, "temperature": 2.0}, weighting="margin",
                   method={"name": "kd", "options": {"temperature": 2.0}})  # fmt: skip
    assert "k: 2" not in warm


@pytest.mark.parametrize("weighting", ["mgda", "ae_kd"])
def test_inner_products_of_gradients_need_more_than_draws(weighting: str, tmp_path: Path) -> None:
    draws = {"targets": "sampled", "k": 20}
    found = message(tmp_path, cache=draws, weighting=weighting, method={"name": "kd", "options": {"temperature": 1.0}})
    assert "targets: sampled" in found
    assert "targets: top (stages.cache)" in found


def test_masked_tokens_cannot_be_cached(tmp_path: Path) -> None:
    made = cache_runs.values(tmp_path, cache=EXACT, student={})
    made["data"]["text"]["task"] = "masked-lm"
    for stage in made["stages"].values():
        if "student" in stage:
            stage["student"]["architecture"] = "bert"
    with pytest.raises(UserError, match="other masked tokens in every epoch"):
        plan(cache_runs.config(tmp_path, made))


def test_classes_do_not_read_the_settings_of_tokens(tmp_path: Path) -> None:
    made = cache_runs.class_values(tmp_path, cache={"k": 3}, student={"method": "kd"})
    with pytest.raises(UserError, match="every class logit") as caught:
        plan(cache_runs.config(tmp_path, made))
    assert caught.value.where == "stages.cache.cache.k"


def test_a_folder_of_class_logits_where_only_the_data_tells_the_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan finds the data's three classes in its rows: a cache of three fits, one of two or of numbers does not."""
    made = cache_runs.class_values(tmp_path, cache={}, student={"method": None, "match": [{}]})
    del made["data"]["text"]["labels"]
    made["stages"] = {
        "student": {**made["stages"]["student"], "teachers": [{**cache_runs.CACHED[0], "model": "there"}]}
    }
    made["evaluate"] = {"resamples": 100}
    config = cache_runs.config(tmp_path, made)
    for classes in (2, 3, 1):
        model = BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_labels=classes)
        facts = CacheFacts(CacheContent("classes", 0, 1.0, classes), model_info(model, CLASSIFIER), 1000, "there")
        monkeypatch.setattr("mtkd.planning.teachers.read_facts", lambda *_, facts=facts: facts)
        if classes == 3:
            assert plan(config).stages[0].models[1].role == "teacher"
            continue
        with pytest.raises(UserError, match="another number of classes"):
            plan(config)


def test_other_data_than_the_caches(tmp_path: Path) -> None:
    made = cache_runs.values(tmp_path, cache=EXACT, student={})
    made["data"]["short"] = {**made["data"]["text"], "max_length": 32}
    for name, stage in made["stages"].items():
        stage["data"] = "short" if name == "student" else "text"
    made["evaluate"]["data"] = "text"
    with pytest.raises(UserError, match="'text'; this stage trains on 'short'") as caught:
        plan(cache_runs.config(tmp_path, made))
    assert "max_length" in str(caught.value.found)


def test_other_files_than_the_caches(tmp_path: Path) -> None:
    """A copy is the same data; other rows under equal options are not."""
    made = cache_runs.values(tmp_path, cache=EXACT, student={})
    cache_runs.write(tmp_path, made)
    names = {split: Path(file).with_name(f"copy-{Path(file).name}") for split, file in
             made["data"]["text"]["files"].items()}  # fmt: skip
    for split, file in made["data"]["text"]["files"].items():
        shutil.copy(tmp_path / "data" / file, tmp_path / "data" / names[split])
    made["data"]["copy"] = {**made["data"]["text"], "files": {split: str(file) for split, file in names.items()}}
    for name, stage in made["stages"].items():
        stage["data"] = "copy" if name == "student" else "text"
    made["evaluate"]["data"] = "text"
    plan(cache_runs.config(tmp_path, made))
    train = tmp_path / "data" / names["train"]
    train.write_text("\n".join(train.read_text().splitlines()[::-1]) + "\n")
    with pytest.raises(UserError, match="'text'; this stage trains on 'copy'") as caught:
        plan(cache_runs.config(tmp_path, made))
    assert "files.train" in str(caught.value.found)


def test_a_compressed_student_needs_whole_rows(tmp_path: Path) -> None:
    made = cache_runs.values(tmp_path, cache=EXACT, student={})
    made["stages"]["student"]["student"] = {"path": "stage:teacher", "vocabulary": {"keep": 0.9}}
    with pytest.raises(UserError, match="part of the ids"):
        plan(cache_runs.config(tmp_path, made))


def test_the_plan_shows_what_is_kept_and_how_large_it_becomes(tmp_path: Path) -> None:
    made = cache_runs.values(tmp_path, cache={"k": 50, "traits": ["ce"]}, student={})
    stages = {stage.name: stage for stage in plan(cache_runs.config(tmp_path, made), memory=True).stages}
    cache, student, live = stages["cache"], stages["student"], stages["live"]
    assert [m.role for m in cache.models] == ["teacher", "other"]
    assert cache.needs == ["teacher", "other"]
    assert "top 50 of 300 ids" in cache.rows[0]
    assert "GB" in cache.rows[0]
    assert student.models[1].origin == "cache stage:cache/teacher"
    assert student.models[1].parameters == live.models[1].parameters
    assert student.memory is not None
    assert live.memory is not None
    held = [{part.name for part in memory.parts} for memory in (student.memory, live.memory)]
    assert ["teachers' weights" in names for names in held] == [False, True]


def test_bytes_per_token_at_the_scale_of_real_vocabularies() -> None:
    """The bounds of the plan at V = 151,936: at most 130 bytes for k = 50, and 350 for k = 128."""
    info = plan_info()
    for k, most in ((50, 130), (128, 350)):
        content = content_of(CacheConfig(k=k), token_level=True, columns=151_936, seed=0)
        assert bytes_per_token(content, info) <= most


def plan_info() -> Any:
    from tiny import causal_model

    return causal_model(16, 1, seed=0).info


@pytest.mark.parametrize(
    ("field", "value", "differs"),
    [
        ("targets", "sampled", "targets"), ("k", 7, "k"), ("temperature", 3.0, "temperature"), ("bits", 9, "bits"),
        ("hidden", ["hidden.1"], "hidden"), ("dtype", "bfloat16", "dtype"), ("traits", ["ce"], "ce"),
        ("traits", ["margin"], "scalars"),
    ],
)  # fmt: skip
def test_every_field_is_a_part_of_the_content(field: str, value: object, differs: str) -> None:
    def content(**values: object) -> CacheContent:
        return content_of(CacheConfig.model_validate(values), token_level=True, columns=300, seed=0)

    assert getattr(content(**{field: value}), differs) != getattr(content(), differs)
    drawn = {"targets": "sampled"}
    assert content(**drawn, proposal=1.5).proposal != content(**drawn).proposal


def test_a_chain_below_cached_teachers(tmp_path: Path) -> None:
    """Every stage of a DGKD chain reads the caches; the ensemble that would need them live is not scored."""
    made = cache_runs.values(tmp_path, cache=EXACT, student={})
    for name in ("student", "live"):
        del made["stages"][name]
    made["chain"] = {
        "mode": "dgkd",
        "teachers": cache_runs.CACHED,
        "student": {"architecture": "gpt2", "layers": 1, "width": 4, "heads": 2},
        "rungs": [{"layers": 1, "width": 8, "heads": 2}],
        "steps": 2,
    }
    config = cache_runs.config(tmp_path, made)
    assert config.evaluate.ensembles == ("cache",)
    needs = {stage.name: stage.needs for stage in plan(config).stages}
    assert needs["student"] == ["cache", "assistant-1"]
    assert needs["direct"] == ["cache"]
