"""Writing, resuming, reading and checking a cache: what was stored comes back by example number, or an error does."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mtkd.data.batch import NO_LABEL, Batch
from mtkd.engine.record import record_text
from mtkd.engine.testing import RankError, run_distributed
from mtkd.errors import DataError, UserError
from mtkd.models.features import DenseLogits, Features, SparseLogits
from mtkd.pool.cache import CacheContent, CacheOrigin, CacheReader, CacheWriter, Record, make_records, verify
from mtkd.pool.cache.shard import shard_name
from mtkd.weightings.traits import TRAITS

COLUMNS, WIDTH, LENGTH = 40, 6, 9
EXAMPLES = 11
ORIGIN = CacheOrigin("teacher-a", "tokenizer-a", "data-a", "train", EXAMPLES, {"hidden_size": WIDTH}, "fp32")
TOP = CacheContent("top", 8, 1.0, COLUMNS, ("hidden.2", "cls.2"), True, "float32", 8, scalars=("entropy",))
SAMPLED = CacheContent("sampled", 16, 2.0, COLUMNS, proposal=1.5, seed=3)


def batch_of(ids: list[int]) -> Batch:
    """Examples of 3 to 9 tokens, with 2 to 8 targets; -1 is a filler row."""
    generator = torch.Generator().manual_seed(1)
    lengths = 3 + torch.arange(EXAMPLES) % (LENGTH - 2)
    whole = torch.randint(COLUMNS, (EXAMPLES, LENGTH), generator=generator)
    mask = torch.arange(LENGTH) < lengths[:, None]
    targets = whole.roll(-1, 1).masked_fill(torch.arange(LENGTH) >= lengths[:, None] - 1, NO_LABEL)
    rows = torch.tensor(ids).clamp_min(0)
    filler = torch.tensor(ids) < 0
    mask = mask[rows] & (~filler[:, None] | (torch.arange(LENGTH) == 0))
    return Batch(torch.tensor(ids), whole[rows], mask, targets[rows])


def features_of(batch: Batch) -> Features:
    """A function of the example and the place: a teacher would give the same."""
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(EXAMPLES, LENGTH, COLUMNS, generator=generator)
    hidden = torch.randn(EXAMPLES, LENGTH, WIDTH, generator=generator)
    rows = batch.keys.clamp_min(0)
    return {"logits": DenseLogits(logits[rows]), "hidden.2": hidden[rows], "cls.2": hidden[rows, 0]}


def records(content: CacheContent, ids: list[int]) -> list[Record]:
    batch = batch_of(ids)
    return make_records(content, batch, features_of(batch), tile=5)


def written(folder: Path, content: CacheContent, origin: CacheOrigin = ORIGIN) -> Path:
    writer = CacheWriter(folder, content, origin, shard_examples=3)
    for number, ids in writer.missing():
        writer.write(number, records(content, list(ids)))
    writer.finish()
    return folder


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_hidden_states_come_back_in_any_order(tmp_path: Path, dtype: str) -> None:
    content = CacheContent("top", 8, 1.0, COLUMNS, ("hidden.2", "cls.2"), dtype=dtype)
    reader = CacheReader(written(tmp_path / "c", content))
    for ids in ([4, 0, -1, 10], [10, 9, 8, 7, 6], [3, 3]):
        batch = batch_of(ids)
        found = reader.read(ids).features("t", batch, frozenset({"hidden.2", "cls.2"}))
        wanted = features_of(batch)
        for key in ("hidden.2", "cls.2"):
            value, exact = found[key], wanted[key]
            assert isinstance(value, torch.Tensor)
            assert isinstance(exact, torch.Tensor)
            exact = exact.to(getattr(torch, dtype)).float()
            where = batch.token_mask if key == "hidden.2" else batch.real
            torch.testing.assert_close(value[where], exact[where], rtol=0, atol=0)
            assert not value[~where].any()


def test_targets_and_traits_come_back_at_their_positions(tmp_path: Path) -> None:
    reader = CacheReader(written(tmp_path / "c", TOP))
    ids = [7, 2, -1, 9]
    batch = batch_of(ids)
    index = batch.target_mask.reshape(-1).nonzero().squeeze(-1)
    found = reader.read(ids).logits("t", batch)
    exact = features_of(batch)["logits"]
    assert isinstance(found, SparseLogits)
    assert isinstance(exact, DenseLogits)
    log_probs, labels = exact.rows(index).log_softmax(-1), batch.targets.reshape(-1)[index]
    rows = found.sparse(index)
    kept = log_probs.topk(8, -1)
    torch.testing.assert_close(rows.ids, kept.indices.sort(-1).values)
    torch.testing.assert_close(rows.log_probs, log_probs.gather(-1, rows.ids), rtol=0, atol=0.05)
    assert rows.tail is not None
    torch.testing.assert_close(rows.tail.exp(), 1 - kept.values.exp().sum(-1), rtol=3e-3, atol=1e-5)
    for name in ("ce", "entropy", "choice"):
        torch.testing.assert_close(found.trait(name, index), TRAITS[name](exact.rows(index), labels))
    for name in ("confidence", "margin"):
        torch.testing.assert_close(found.trait(name, index), TRAITS[name](exact.rows(index), labels), rtol=0, atol=0.02)
    with pytest.raises(DataError, match="nothing at a position that counts"):
        found.sparse(torch.tensor([2 * LENGTH]))  # of the filler row


@pytest.mark.parametrize("content", [TOP, SAMPLED], ids=["top", "sampled"])
def test_the_log_probability_of_every_token_comes_back(tmp_path: Path, content: CacheContent) -> None:
    """Exactly, at every unpadded token, target or not; targets and other traits stay as they are."""
    content = replace(content, scalars=("token_log_probs", *content.scalars))
    reader = CacheReader(written(tmp_path / "c", content))
    assert verify(tmp_path / "c").fine
    ids = [7, 2, -1, 9]
    batch = batch_of(ids)
    found, exact = reader.read(ids).logits("t", batch), features_of(batch)["logits"]
    assert isinstance(found, SparseLogits)
    assert isinstance(exact, DenseLogits)
    expected = torch.zeros(4, LENGTH)
    for row in (0, 1, 3):
        for place in range(1, int(batch.attention_mask[row].sum())):
            expected[row, place] = exact.values[row, place - 1].log_softmax(-1)[batch.input_ids[row, place]]
    torch.testing.assert_close(found.text_fact("token_log_probs"), expected, rtol=1e-6, atol=1e-6)
    plain = reader.content.scalars[1:]
    other = CacheReader(written(tmp_path / "o", replace(content, scalars=plain))).read(ids).logits("t", batch)
    assert isinstance(other, SparseLogits)
    assert torch.equal(other.values.log_probs, found.values.log_probs)
    assert other.traits.keys() == found.traits.keys()
    with pytest.raises(UserError, match="does not know the trait 'token_log_probs'"):
        other.text_fact("token_log_probs")


def test_class_logits_are_whole(tmp_path: Path) -> None:
    content = CacheContent("classes", 0, 1.0, 3)
    origin = CacheOrigin("t", "k", "d", "train", 4, {}, "fp32")
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 5, dtype=torch.bool)
    batch = Batch(torch.arange(4), mask.long(), mask, torch.tensor([0, 2, NO_LABEL, 1]))
    writer = CacheWriter(tmp_path / "c", content, origin, shard_examples=4)
    writer.write(0, make_records(content, batch, {"logits": logits}))
    writer.finish()
    batch = Batch(torch.tensor([3, -1, 2]), mask[:3].long(), mask[:3], torch.tensor([1, 0, NO_LABEL]))
    found = CacheReader(tmp_path / "c").read([3, -1, 2]).logits("t", batch)
    torch.testing.assert_close(found.rows(torch.tensor([0, 2])), logits[[3, 2]], rtol=0, atol=0)


def test_the_facts_are_the_files_sizes_and_the_measured_divergence(tmp_path: Path) -> None:
    content = CacheContent("top", 8, 2.0, COLUMNS)
    folder = written(tmp_path / "c", content)
    facts = CacheReader(folder).facts
    assert facts["bytes"] == sum(path.stat().st_size for path in folder.glob("shard-*"))
    assert facts["bytes_per_position"] == facts["bytes"] / facts["positions"]
    total, largest, reader = 0.0, 0.0, CacheReader(folder)
    for example in range(EXAMPLES):
        batch = batch_of([example])
        index = batch.target_mask.reshape(-1).nonzero().squeeze(-1)
        found, exact = reader.read([example]).logits("t", batch), features_of(batch)["logits"]
        assert isinstance(found, SparseLogits)
        assert isinstance(exact, DenseLogits)
        rows, log_probs = found.sparse(index), (exact.rows(index).double() / 2).log_softmax(-1)
        kept = log_probs.gather(-1, rows.ids)
        tail = (1 - kept.exp().sum(-1)).log()
        assert rows.tail is not None
        total += float((kept.exp() * (kept - rows.log_probs)).sum() + (tail.exp() * (tail - rows.tail)).sum())
        largest = max(largest, float((kept - rows.log_probs).abs().max()))
    assert facts["kl"] == pytest.approx(total / facts["positions"], rel=1e-3, abs=1e-7)
    assert facts["max_log_prob_error"] == pytest.approx(largest, rel=1e-4)


@pytest.mark.parametrize("content", [TOP, SAMPLED], ids=["top", "sampled"])
def test_writers_on_disjoint_shards_give_the_same_bytes(tmp_path: Path, content: CacheContent) -> None:
    one = content_of(written(tmp_path / "one", content))
    writers = [CacheWriter(tmp_path / "two", content, ORIGIN, shard_examples=3) for _ in range(2)]
    for rank, writer in reversed(list(enumerate(writers))):
        for number, ids in CacheWriter(tmp_path / "two", content, ORIGIN, shard_examples=3).missing()[rank::2]:
            writer.write(number, records(content, list(ids))[::-1])
    for number, ids in writers[0].missing():
        writers[0].write(number, records(content, list(ids)))
    writers[0].finish()
    assert content_of(tmp_path / "two") == one


def test_draws_are_a_function_of_seed_example_and_place(tmp_path: Path) -> None:
    alone = [records(SAMPLED, [example, -1])[0] for example in range(EXAMPLES)]
    together = records(SAMPLED, list(range(EXAMPLES))[::-1])[::-1]
    for one, other in zip(alone, together, strict=True):
        assert (one.targets["ids"] == other.targets["ids"]).all()
        assert (one.targets["counts"] == other.targets["counts"]).all()
    assert (alone[7].targets["ids"][0] != records(replace(SAMPLED, seed=4), [7])[0].targets["ids"][0]).any()
    assert (alone[7].targets["ids"][0] != alone[7].targets["ids"][1]).any()


@pytest.mark.parametrize("point", ["before-cache-shard@2", "after-cache-shard@2", "before-manifest"])
def test_a_kill_loses_at_most_one_shard_and_the_rest_is_written_the_same(
    tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("MTKD_TEST_KILL_AT", point)
        with pytest.raises(RankError, match="rank 0 ended with exit code -9"):
            run_distributed(written, 1, tmp_path / "c", SAMPLED)
    # half a file of a writer that died inside the write
    (tmp_path / "c" / f".tmp-{shard_name(2)}-1").write_bytes(b"half")
    with pytest.raises(DataError, match="no manifest"):
        CacheReader(tmp_path / "c")
    left = CacheWriter(tmp_path / "c", SAMPLED, ORIGIN, shard_examples=3).missing()
    assert [number for number, _ in left] == {"before-cache-shard@2": [2, 3], "after-cache-shard@2": [3]}.get(point, [])
    assert content_of(written(tmp_path / "c", SAMPLED)) == content_of(written(tmp_path / "whole", SAMPLED))


def test_a_folder_of_another_cache_is_not_continued(tmp_path: Path) -> None:
    CacheWriter(tmp_path / "c", TOP, ORIGIN, shard_examples=3)
    with pytest.raises(DataError, match="something else") as error:
        CacheWriter(tmp_path / "c", SAMPLED, ORIGIN, shard_examples=3)
    assert "content.targets 'top' instead of 'sampled'" in str(error.value)
    with pytest.raises(UserError, match="4 shards are not yet written"):
        CacheWriter(tmp_path / "c", TOP, ORIGIN, shard_examples=3).finish()


@pytest.mark.parametrize("name", ["teacher", "tokenizer", "data"])
def test_another_teacher_tokenizer_or_data_set_is_refused_with_both_digests(tmp_path: Path, name: str) -> None:
    reader = CacheReader(written(tmp_path / "c", TOP))
    reader.check(ORIGIN, "here")
    other = CacheOrigin(**{**ORIGIN.as_json(), name: "digest-b"})
    with pytest.raises(DataError, match=f"another {name}") as error:
        reader.check(other, "here")
    assert f"{name}-a" in str(error.value)
    assert "digest-b" in str(error.value)


def test_a_missing_example_is_an_error_never_zeros(tmp_path: Path) -> None:
    reader = CacheReader(written(tmp_path / "c", TOP))
    with pytest.raises(DataError, match="no example 11"):
        reader.read([0, EXAMPLES])
    batch = batch_of([4])
    with pytest.raises(DataError, match="another number of tokens") as error:
        reader.read([5]).logits("t", batch)  # of other lengths
    assert "example 5" in str(error.value)
    more = batch_of([4])
    more.targets[0, 0] = NO_LABEL  # of the same length
    with pytest.raises(DataError, match="another number of positions"):
        reader.read([4]).logits("t", more)
    with pytest.raises(DataError, match=r"'hidden\.1' was not stored"):
        reader.read([4]).features("t", batch, frozenset({"hidden.1"}))


def test_inputs_of_another_length_are_told_though_the_targets_are_as_many(tmp_path: Path) -> None:
    """A system turn that the chat template adds is read and not predicted."""
    reader, batch = CacheReader(written(tmp_path / "c", TOP)), batch_of([4])
    longer = Batch(
        batch.keys,
        torch.cat([batch.input_ids, batch.input_ids[:, :1]], 1),
        torch.cat([batch.attention_mask[:, :1], batch.attention_mask], 1),
        torch.cat([torch.full((1, 1), NO_LABEL), batch.targets], 1),
    )
    with pytest.raises(DataError, match="another number of tokens"):
        reader.read([4]).logits("t", longer)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no list of open files")
def test_shards_that_were_read_keep_no_file_open(tmp_path: Path) -> None:
    reader = CacheReader(written(tmp_path / "c", TOP))
    opened = len(list(Path("/proc/self/fd").iterdir()))
    reader.read(range(EXAMPLES))
    assert len(list(Path("/proc/self/fd").iterdir())) == opened


def test_a_shard_that_is_let_go_is_read_again_and_its_arrays_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(tmp_path / "c", TOP)
    wanted = CacheReader(folder).read([0, 10, 5, 1])
    monkeypatch.setattr("mtkd.pool.cache.reader._MAPPED", 2)
    reader = CacheReader(folder)
    held = reader.shard(0).arrays["tokens"]
    before = held.tolist()
    found = reader.read([0, 10, 5, 1])
    assert wanted.values is not None
    assert found.values is not None
    for ours, theirs in ((found.values.log_probs, wanted.values.log_probs), (found.tokens, wanted.tokens)):
        assert torch.equal(ours, theirs)
    assert list(reader._shards) == [1, 0]
    assert held.tolist() == before


def test_a_cache_of_another_user_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path / "c", TOP)
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    assert CacheReader(folder).read([3]).ids == (3,)
    assert verify(folder).fine
    _flip(folder / shard_name(1))
    assert not verify(folder).fine


def test_a_cache_in_another_precision_is_refused_with_both(tmp_path: Path) -> None:
    reader = CacheReader(written(tmp_path / "c", TOP))
    with pytest.raises(DataError, match="another precision") as error:
        reader.check(replace(ORIGIN, precision="bf16"), "here")
    assert (error.value.found, error.value.allowed) == ("fp32 in the cache", "bf16 in this run")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20] ^= 255
    path.write_bytes(data)


class _Payload:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (Path("executed"),)  # type: ignore[return-value]


def _pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(_Payload()).ljust(path.stat().st_size, b"."))


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "wrong size"),
    "missing": (lambda path: path.unlink(), "missing"),
    "flipped": (_flip, "sha256"),
    "pickle": (_pickled, "sha256"),
    "swapped": (lambda path: path.write_bytes((path.parent / shard_name(2)).read_bytes()), "sha256|wrong size"),
}


@pytest.mark.parametrize("how", BREAKS)
def test_a_broken_shard_is_found(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path / "c", TOP)
    assert verify(folder).fine
    monkeypatch.chdir(tmp_path)
    breaks, reason = BREAKS[how]
    breaks(folder / shard_name(1))
    result = verify(folder)
    assert any(shard_name(1) in problem for problem in result.problems), result.problems
    assert not [problem for problem in result.problems if shard_name(0) in problem]
    with pytest.raises(AssertionError):
        assert result.fine, reason
    with pytest.raises(DataError, match=reason):
        CacheReader(folder).read([3])
    assert not (tmp_path / "executed").exists()


def test_a_shard_whose_digest_was_forged_is_still_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path / "c", TOP)
    monkeypatch.chdir(tmp_path)
    path = folder / shard_name(1)
    path.write_bytes(pickle.dumps(_Payload()))
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest["files"][path.name] = {"size": path.stat().st_size, "sha256": digest}
    del manifest["sha256"]
    (folder / "MANIFEST.json").write_text(record_text(manifest))
    with pytest.raises(DataError, match="not a shard"):
        CacheReader(folder).read([3])
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"k": 0}, "k"),
        ({"k": COLUMNS + 1}, "k"),
        ({"targets": "all"}, "targets"),
        ({"bits": 3}, "bits"),
        ({"temperature": 0.0}, "temperature"),
        ({"hidden": ("scores.1",)}, "hidden"),
        ({"scalars": ("ce",)}, "scalars"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_content_that_cannot_be_stored_is_refused(change: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError) as error:
        CacheContent(**{**TOP.as_json(), **change}).check("stages.cache")
    assert error.value.where == f"stages.cache.{field}"


def test_logits_of_examples_of_another_length_are_refused(tmp_path: Path) -> None:
    """As many targets as before, and another prompt before them (a chat template that was changed)."""
    read = CacheReader(written(tmp_path / "cache", TOP)).read([2, 5])
    batch = batch_of([2, 5])
    read.features("t", batch, frozenset({"logits"}))
    longer = replace(
        batch,
        input_ids=torch.nn.functional.pad(batch.input_ids, (1, 0)),
        attention_mask=torch.nn.functional.pad(batch.attention_mask, (1, 0), value=True),
        targets=torch.nn.functional.pad(batch.targets, (1, 0), value=NO_LABEL),
    )
    with pytest.raises(DataError, match="another number of tokens"):
        read.features("t", longer, frozenset({"logits"}))


@pytest.mark.parametrize("content", [TOP, SAMPLED])
def test_any_flipped_bit_of_a_cache_is_refused_when_it_is_first_read(tmp_path: Path, content: CacheContent) -> None:
    """Law: no example is read from a shard that has another bit than was sealed, wherever the bit is."""
    whole = written(tmp_path / "whole", content)
    size = (whole / shard_name(1)).stat().st_size
    for number, place in enumerate(range(0, size, size // 60)):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        data = bytearray((folder / shard_name(1)).read_bytes())
        data[place] ^= 1 << number % 8
        (folder / shard_name(1)).write_bytes(data)
        reader = CacheReader(folder)
        assert reader.read([0]).ids == (0,)
        with pytest.raises(DataError, match="sha256"):
            reader.read([3])


def test_a_shard_that_was_damaged_before_the_cache_is_sealed_is_written_again(tmp_path: Path) -> None:
    whole = content_of(written(tmp_path / "c", TOP))
    (tmp_path / "c" / "MANIFEST.json").unlink()
    for number, place in enumerate((-20, 30, 200)):
        data = bytearray((tmp_path / "c" / shard_name(number)).read_bytes())
        data[place] ^= 4
        (tmp_path / "c" / shard_name(number)).write_bytes(data)
    writer = CacheWriter(tmp_path / "c", TOP, ORIGIN, shard_examples=3)
    assert [number for number, _ in writer.missing()] == [0, 1, 2]
    with pytest.raises(UserError, match="3 shards are not yet written, or not whole"):
        writer.finish()
    assert content_of(written(tmp_path / "c", TOP)) == whole


def test_a_description_that_was_changed_in_the_manifest_alone_is_refused(tmp_path: Path) -> None:
    """A manifest of an earlier version has no digest of itself; the plan beside it has what it describes."""
    folder = written(tmp_path / "c", TOP)
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    del manifest["sha256"], manifest["format"]
    (folder / "MANIFEST.json").write_text(json.dumps({**manifest, "format": 1}))
    assert CacheReader(folder).read([3]).ids == (3,)
    manifest["content"]["temperature"] = 9.0
    (folder / "MANIFEST.json").write_text(json.dumps({**manifest, "format": 1}))
    with pytest.raises(DataError, match="not that of this cache"):
        CacheReader(folder)
