"""A whole run on chats: a trained tokenizer with a template, a teacher of chats, a student that answers prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import mtkd
from mtkd.config.read import load_config
from mtkd.engine.jsonlines import read_jsonl
from mtkd.errors import UserError

RUN = """
name: chats
tokenizer: {train_on: chats, vocab_size: 300, chat_template: chatml}
data:
  chats:
    source: files
    files: {train: chats.jsonl, validation: chats.jsonl}
    messages: conversations
    max_length: 48
  prompts: {source: files, files: {train: prompts.jsonl}, messages: conversations, prompts_only: true, max_length: 48}
engine: {kind: torch, device: cpu, precision: fp32}
stages:
  teacher:
    kind: finetune
    data: chats
    student: &model {architecture: llama, layers: 1, width: 32, heads: 2}
    steps: 3
    batch: {sequences: 4}
  student:
    kind: distill
    data: prompts
    student: *model
    teachers: ["stage:teacher"]
    match: [{feature: logits, loss: reverse_kl}]
    rollout: {max_new_tokens: 6}
    steps: 2
    batch: {sequences: 4}
log_every: 1
evaluate: {data: chats, split: validation}
"""


def written(folder: Path) -> Path:
    chats = [[("human", f"say {n}"), ("gpt", f"{n} it is"), ("human", "again"), ("gpt", f"{n}")] for n in range(8)]
    for name, turns in (("chats", 4), ("prompts", 3)):
        rows = [{"conversations": [{"from": who, "value": text} for who, text in chat[:turns]]} for chat in chats]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(RUN)
    return folder / "run.yaml"


def test_chats_are_learned_and_prompts_alone_are_answered(tmp_path: Path) -> None:
    """The export has the template and ends where an answer ends; every line of the student's log is of written text."""
    mtkd.run(load_config(written(tmp_path), [f"output={tmp_path}/runs"]))
    folder = tmp_path / "runs/chats"
    tokenizer = AutoTokenizer.from_pretrained(folder / "stages/02-student/export")
    assert tokenizer.eos_token == "<|im_end|>"
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say 1"}], add_generation_prompt=True, tokenize=False
    )
    assert asked == "<|im_start|>user\nsay 1<|im_end|>\n<|im_start|>assistant\n"
    lines = [line for line in read_jsonl(folder / "metrics.jsonl") if "rollout/length" in line]
    assert len(lines) == 2
    assert all(1 <= line["rollout/length"] <= 6 for line in lines)
    assert "bits_per_byte" in (folder / "results.json").read_text()


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ("stages.student.rollout.share=0.5", "stages.student.data"),
        ("stages.teacher.data=prompts", "stages.teacher.data"),
        ("evaluate.data=prompts", "evaluate.data"),
        ("stages.student.export=best stages.student.evaluate_every=1", "stages.student.export"),
    ],
)
def test_prompts_alone_are_refused_where_answers_are_read(tmp_path: Path, change: str, where: str) -> None:
    with pytest.raises(UserError, match="prompts alone") as refused:
        mtkd.plan(load_config(written(tmp_path), change.split()))
    assert refused.value.where == where
