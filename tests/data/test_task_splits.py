"""Examples of the three tasks: every token is asked for once, masking keeps its promises, filler rows count nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from data_examples import sentences
from transformers import PreTrainedTokenizerFast

from mtkd.data.batch import NO_LABEL, position_counts
from mtkd.data.load import LoadedData
from mtkd.errors import DataError, UserError
from mtkd.registry import TASKS

Loader = Callable[..., LoadedData]
TEXTS = [*sentences(20), "a", "  ", *sentences(3, seed=9, longest=300)]


@pytest.mark.parametrize("max_length", [1, 7, 128, 1000])
def test_causal_targets_spell_the_whole_document(
    max_length: int, load: Loader, tokenizer: PreTrainedTokenizerFast
) -> None:
    split = load({"text": TEXTS}, max_length=max_length).splits["train"]
    kept = [t for t in TEXTS if t.strip()]
    inputs: dict[int, list[int]] = {}
    targets: dict[int, list[int]] = {}
    for example in range(len(split)):
        batch = split.collate([example, (example + 5) % len(split)])
        assert batch.input_ids.shape[1] <= max_length
        asked = batch.target_mask[0]
        assert torch.equal(asked, batch.token_mask[0])
        assert int(asked.sum()) == split.lengths[example]
        document = int(split.documents[example])
        inputs.setdefault(document, []).extend(batch.input_ids[0][asked].tolist())
        targets.setdefault(document, []).extend(batch.targets[0][asked].tolist())
    assert len(targets) == len(kept) == len(split.document_names)
    for document, text in enumerate(kept):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert targets[document] == [*ids, tokenizer.eos_token_id]
        assert inputs[document] == [tokenizer.bos_token_id, *ids]
        assert tokenizer.decode(targets[document][:-1]) == text
        assert split.document_bytes[document] == len(text.encode())


def test_causal_without_a_beginning_token_does_not_count_the_first_token(
    load: Loader, tokenizer: PreTrainedTokenizerFast
) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    text = "naïve things – 漢字 too"
    split = load({"text": [text]}, tokenizer=bare, max_length=4).splits["train"]
    ids = bare(text, add_special_tokens=False)["input_ids"]
    asked = [int(t) for e in range(len(split)) for t in split.collate([e]).targets.flatten()]
    assert asked == ids[1:]
    assert split.document_bytes[0] == len(bare.decode(ids[1:]).encode())
    one_token = bare.decode(ids[:1])
    with pytest.raises(DataError, match="only one token") as caught:
        load({"text": [text, one_token]}, tokenizer=bare)
    assert "row 2" in str(caught.value)


def test_names_and_domains_are_columns_that_a_key_names(load: Loader) -> None:
    columns = {"text": ["one", " ", "two"], "name": ["m#1", "m#2", "n#1"], "domain": ["prose", "prose", "code"]}
    columns["label"] = columns["id"] = ["x", "x", "x"]
    unnamed = load(columns).splits["train"]
    assert (unnamed.document_names, unnamed.document_domains) == (["train:1", "train:3"], ["", ""])
    split = load(columns, name="name", domain="domain").splits["train"]
    with pytest.raises(DataError, match="two rows have the same name"):
        load(columns, name="id")
    with pytest.raises(DataError, match="no column 'names'"):
        load(columns, name="names")
    assert split.document_names == ["m#1", "n#1"]
    assert split.document_domains == ["prose", "code"]
    plain = load({"text": ["one", " ", "two"]}).splits["train"]
    assert plain.document_names == ["train:1", "train:3"]
    assert plain.document_domains == ["", ""]


def unmasked(batch_inputs: torch.Tensor, targets: torch.Tensor) -> list[int]:
    return torch.where(targets != NO_LABEL, targets, batch_inputs).tolist()


def test_masked_blocks_hold_the_document_and_its_special_tokens(
    load: Loader, tokenizer: PreTrainedTokenizerFast
) -> None:
    split = load({"text": TEXTS}, task="masked-lm", max_length=16).splits["train"]
    found: dict[int, list[int]] = {}
    for example in range(len(split)):
        batch = split.collate([example])
        whole = unmasked(batch.input_ids[0], batch.targets[0])
        assert (whole[0], whole[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert len(whole) <= 16
        found.setdefault(int(split.documents[example]), []).extend(whole[1:-1])
        assert batch.targets[0, 0] == batch.targets[0, -1] == NO_LABEL
        assert int(batch.target_mask.sum()) >= 1
    for document, text in enumerate(t for t in TEXTS if t.strip()):
        assert found[document] == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_masking_follows_bert(load: Loader, tokenizer: PreTrainedTokenizerFast) -> None:
    split = load({"text": sentences(1500, longest=120)}, task="masked-lm").splits["train"]
    batch = split.collate(range(len(split)))
    chosen = batch.target_mask
    ordinary = batch.token_mask.sum() - 2 * len(split)
    assert chosen.sum() / ordinary == pytest.approx(0.15, abs=0.005)
    inputs, targets = batch.input_ids[chosen], batch.targets[chosen]
    masked = inputs == tokenizer.mask_token_id
    same = inputs == targets
    assert masked.float().mean() == pytest.approx(0.8, abs=0.015)
    assert same.float().mean() == pytest.approx(0.1, abs=0.015)  # 1 in about 400 random tokens is the same by chance
    assert (~masked & ~same).float().mean() == pytest.approx(0.1, abs=0.015)
    substitutes = inputs[~masked & ~same]
    assert not torch.isin(substitutes, torch.tensor(tokenizer.all_special_ids)).any()
    assert len(substitutes.unique()) > 200


def test_masking_is_a_pure_function_of_seed_epoch_and_example(load: Loader) -> None:
    def masked(example: int, epoch: int, seed: int = 0, beside: int = 0) -> list[int]:
        texts = [" ".join(sentences(9, seed=i)) for i in range(5)]
        split = load({"text": texts}, task="masked-lm", seed=seed).splits["train"]
        batch = split.collate([beside, example], epoch=epoch)
        return (batch.targets[1] != NO_LABEL).nonzero().flatten().tolist()

    assert masked(4, 2) == masked(4, 2, beside=7)
    assert masked(4, 2) != masked(4, 3)
    assert masked(4, 2) != masked(4, 2, seed=1)
    assert masked(4, 2, seed=2**32 - 1) == masked(4, 2, seed=2**32 - 1)


def test_masking_asks_for_something_however_small_the_share(load: Loader) -> None:
    split = load({"text": ["a", *TEXTS]}, task="masked-lm", mask_share=1e-6).splits["train"]
    assert position_counts([split.collate(range(len(split)))])["targets"] == len(split)


@pytest.mark.parametrize("task", ["causal-lm", "masked-lm", "classify", "regression"])
@pytest.mark.parametrize("indices", [[], [2, 0]])
def test_filler_rows_count_nothing(task: str, indices: list[int], load: Loader) -> None:
    columns: dict[str, list] = {"text": sentences(3)}
    if task in ("classify", "regression"):
        columns["label"] = [0, 1, 1] if task == "classify" else [0.5, 1.0, 1.5]
    split = load(columns, task="classify" if task == "regression" else task).splits["train"]
    filled, plain = split.collate(indices, size=5), split.collate(indices, size=max(1, len(indices)))
    counts = position_counts([filled])
    assert counts == position_counts([plain])
    assert counts["sequences"] == len(indices)
    assert (counts["tokens"] == 0) == (not indices)
    assert filled.keys.tolist() == [*indices, *[-1] * (5 - len(indices))]
    assert filled.input_ids.shape[0] == filled.targets.shape[0] == 5
    assert filled.attention_mask.any(dim=1).all()  # softmax over nothing would be NaN
    if not indices:
        assert 1 <= filled.input_ids.shape[1] <= 2
        assert counts == {"tokens": 0, "targets": 0, "sequences": 0, "labels": 0, "written": 0}


def test_a_batch_is_padded_to_its_longest_example(load: Loader) -> None:
    split = load({"text": sentences(30)}).splits["train"]
    batch = split.collate([3, 11, 8])
    assert batch.attention_mask.sum(dim=1).tolist() == split.lengths[[3, 11, 8]].tolist()
    assert batch.input_ids.shape[1] == split.lengths[[3, 11, 8]].max()
    assert (batch.targets[~batch.attention_mask] == NO_LABEL).all()
    with pytest.raises(ValueError, match="3 examples"):
        split.collate([3, 11, 8], size=2)


def test_classes_keep_their_names_and_numbers(load: Loader) -> None:
    texts = sentences(4)
    data = load({"text": texts, "label": ["no", "yes", "no", "maybe"]}, task="classify")
    assert (data.label_names, data.num_labels) == (("maybe", "no", "yes"), 3)
    assert data.splits["train"].collate(range(4)).targets.tolist() == [1, 2, 1, 0]
    assert data.splits["train"].labels.tolist() == [1, 2, 1, 0]
    given = load({"text": texts, "label": ["no", "yes", "no", "yes"]}, task="classify", labels=("yes", "no"))
    assert given.splits["train"].collate(range(4)).targets.tolist() == [1, 0, 1, 0]
    numbers = load({"text": texts, "label": [10, 9, 9, 100]}, task="classify")
    assert numbers.label_names == ("9", "10", "100")
    assert load({"text": texts, "label": [True, False, True, True]}, task="classify").label_names == ("false", "true")


@pytest.mark.parametrize("scores", [[1.0, 2.5, 3.0], ["1", "2.5", "3"], ["1.000", "2.500", "0.000"]])
def test_numbers_that_are_not_whole_are_a_regression(scores: list, load: Loader) -> None:
    data = load({"text": sentences(3), "label": scores}, task="classify")
    targets = data.splits["train"].collate([2, 0, 1], size=4).targets
    assert (data.label_names, data.num_labels) == ((), 1)
    assert targets.dtype == torch.float32
    assert targets[:3].tolist() == [float(scores[i]) for i in (2, 0, 1)]
    assert targets[3].isnan()
    assert data.task.metrics_for(data.num_labels) == ("pearson", "spearman")


def test_two_texts_become_one_example(load: Loader, tokenizer: PreTrainedTokenizerFast) -> None:
    columns = {"text": sentences(6), "other": sentences(6, seed=5), "label": [0, 1] * 3}
    split = load(columns, task="classify", text_pair="other", max_length=24).splits["train"]
    for row in range(6):
        expected = tokenizer(columns["text"][row], columns["other"][row], truncation=True, max_length=24)["input_ids"]
        batch = split.collate([row])
        assert batch.input_ids[0].tolist() == expected
        assert batch.token_type_ids is None
        assert split.document_bytes[row] == len((columns["text"][row] + columns["other"][row]).encode())


def test_token_types_are_kept_when_the_tokenizer_makes_them(load: Loader, tokenizer: PreTrainedTokenizerFast) -> None:
    from tokenizers import processors
    from transformers import BertTokenizer

    words = sorted({word for text in sentences(50) for word in text.split()})
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    bert = BertTokenizer(vocab=vocabulary)
    assert isinstance(bert.backend_tokenizer.post_processor, processors.PostProcessor)
    columns = {"text": ["the student", "a"], "other": ["one teacher and", "the loss"], "label": [0, 1]}
    batch = load(columns, tokenizer=bert, task="classify", text_pair="other").splits["train"].collate([0, 1], size=3)
    assert batch.token_type_ids is not None
    assert batch.token_type_ids.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 0, 0], [0] * 8]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"task": "causal-lm", "label": "y"}, "data.corpus.label"),
        ({"task": "causal-lm", "mask_share": 0.2}, "data.corpus.mask_share"),
        ({"task": "masked-lm", "text_pair": "text"}, "data.corpus.text_pair"),
        ({"task": "masked-lm", "mask_share": 0.0}, "data.corpus.mask_share"),
        ({"task": "masked-lm", "max_length": 2}, "data.max_length"),
        ({"task": "causallm"}, "did you mean 'causal-lm'"),
        ({"text": "body"}, "no column 'body'"),
    ],
)
def test_fields_of_another_task_are_refused(fields: dict, expected: str, load: Loader) -> None:
    with pytest.raises(UserError) as caught:
        load({"text": ["one", "two"]}, **fields)
    assert expected in str(caught.value)


def test_blank_texts_alone_are_refused(load: Loader) -> None:
    with pytest.raises(DataError, match="blank"):
        load({"text": ["", " \n"]})


def test_masked_lm_needs_a_mask_token(load: Loader, tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="no mask token"):
        load({"text": ["one"]}, tokenizer=bare, task="masked-lm")


def test_the_fingerprint_follows_every_option_that_shapes_examples(load: Loader) -> None:
    columns = {"text": sentences(3), "label": [0, 1, 0]}
    variants = [{}, {"max_length": 64}, {"task": "masked-lm"}, {"task": "classify"}, {"seed": 1}]
    prints = Counter(load(columns, **fields).fingerprint for fields in variants)
    assert len(prints) == len(variants)
    assert load(columns).fingerprint in prints
    assert load(columns, path="elsewhere").fingerprint == load(columns).fingerprint


def test_the_task_table() -> None:
    assert set(TASKS) >= {"causal-lm", "masked-lm", "classify"}
    import transformers

    for spec in TASKS.values():
        assert hasattr(transformers, spec.auto_class)
    assert [TASKS[n].token_level for n in ("causal-lm", "masked-lm", "classify")] == [True, True, False]
