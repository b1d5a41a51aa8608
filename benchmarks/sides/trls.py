"""TRL's side: the step of its GKDTrainer, with its own loss, with TRL's chunked loss and with liger-kernel's.

TRL 1.16 distils from a fixed text in GKDTrainer, whose loss needs both models' whole logits; its chunked loss stands in
DistillationTrainer, which generates its text first. The arm `trl-chunked` is the best of both: GKDTrainer with the
other trainer's loss function. `liger` is the same with the loss module of liger-kernel that runs without Triton.
"""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor

from sides.setting import (
    BATCH,
    BETA,
    LEARNING_RATE,
    LENGTH,
    STUDENT,
    TEACHER,
    VOCABULARY,
    Result,
    llama,
    measured_steps,
    resident_mb,
    token_ids,
)


def step(loss: str, teachers: int, repeats: int, compiled: bool = False) -> Result:
    """Steps of the trainer with K resident teachers.

    Args: loss: "plain", "chunked" or "liger"; compiled: let liger call torch.compile.
    """
    from trl.experimental.gkd import GKDTrainer

    class Trainer(GKDTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if loss == "plain" and not self.more_teachers:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            pool = [self.teacher_model, *self.more_teachers]
            if loss == "plain":
                return _several(self, model, pool, inputs)
            hidden, labels = _hidden(model, inputs), inputs["labels"][:, 1:]
            total = torch.zeros(())
            for teacher in pool:
                with torch.no_grad():
                    theirs = _hidden(teacher, inputs)
                arguments = (hidden, model.lm_head.weight, theirs, teacher.lm_head.weight, labels)
                total = total + (chunked(*arguments) if loss == "chunked" else liger(*arguments, compiled))
            return total / len(pool)

    models = [llama(TEACHER, 1 + k) for k in range(teachers)]
    trainer = _trainer(Trainer, models[0])
    trainer.more_teachers = [model.eval().requires_grad_(False) for model in models[1:]]
    loaded = resident_mb()
    model = trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # set by `train()`, which is not called here
    # the trainer's default optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0, fused=True)
    ids = token_ids()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone(), "prompts": ids[:, :1]}
    inputs["prompt_attention_mask"] = torch.ones_like(inputs["prompts"])

    def once() -> float:
        value = trainer.training_step(model, dict(inputs))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(value)

    return measured_steps(once, repeats, loaded)


def _several(trainer, model, pool, inputs: dict[str, Tensor]) -> Tensor:
    """What a user of TRL would write for K teachers: the mean of its loss over them."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    total = torch.zeros(())
    for teacher in pool:
        with torch.no_grad():
            theirs = teacher(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
        total = total + trainer.generalized_jsd_loss(logits, theirs, labels=inputs["labels"][:, 1:], beta=BETA)
    return total / len(pool)


def _hidden(model, inputs: dict[str, Tensor]) -> Tensor:
    """Below the head, without the last position."""
    output = model.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    return output.last_hidden_state[:, :-1]


def plain(hidden: Tensor, head: Tensor, theirs: Tensor, their_head: Tensor, labels: Tensor) -> Tensor:
    """TRL's loss on whole logits."""
    from trl.experimental.gkd import GKDTrainer

    with torch.no_grad():
        teacher = theirs @ their_head.t()
    return GKDTrainer.generalized_jsd_loss(hidden @ head.t(), teacher, labels=labels, beta=BETA)


def chunked(hidden: Tensor, head: Tensor, theirs: Tensor, their_head: Tensor, labels: Tensor) -> Tensor:
    """TRL's chunked loss (tiles of 4,096 tokens x 32,768 columns; without Triton in plain torch)."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    return _chunked_divergence_loss(hidden, theirs, head, their_head, labels != -100, BETA)[0]


def liger(hidden: Tensor, head: Tensor, theirs: Tensor, their_head: Tensor, labels: Tensor, compiled: bool) -> Tensor:
    """liger-kernel's chunked JSD (1,024 tokens a chunk), the distillation part alone."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA, compiled=compiled)
    flat = (hidden.reshape(-1, hidden.shape[-1]), head, theirs.reshape(-1, theirs.shape[-1]), their_head)
    return loss(*flat, labels.reshape(-1))


def _trainer(kind: type, teacher):
    """A trainer on one made-up dialogue: it wants a tokenizer and a data set, neither of which is read."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl.experimental.gkd import GKDConfig

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", bos_token="t1", eos_token="t2")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    dialogue = [{"role": "user", "content": "t5"}, {"role": "assistant", "content": "t6"}]
    arguments = GKDConfig(
        output_dir=tempfile.mkdtemp(),
        lmbda=0.0,
        beta=BETA,
        temperature=1.0,
        learning_rate=LEARNING_RATE,
        per_device_train_batch_size=BATCH,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        max_length=LENGTH,
    )
    return kind(
        model=llama(STUDENT, 0),
        teacher_model=teacher,
        args=arguments,
        train_dataset=Dataset.from_list([{"messages": dialogue}] * BATCH),
        processing_class=tokenizer,
    )
