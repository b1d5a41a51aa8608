"""Describe the engine of a run: optimizer, processes, devices, number format."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mtkd.config.base import Config, Gigabytes, Positive, Processes


class EngineConfig(Config):
    """The engine that runs models and optimizer."""

    kind: Literal["torch", "deepspeed"] = Field("torch", description="torch: one process; deepspeed: everything else")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="bf16: autocast; parameters, losses and optimizer stay float32; auto: bf16 where the processor or "
        "the GPU multiplies it fast, else fp32; a run keeps what it was begun in",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU when there is one")
    processes: Processes = Field(
        1, description="deepspeed: processes that `mtkd run` starts on this node; launcher slurm: on every node"
    )
    hostfile: str | None = Field(
        None,
        min_length=1,
        description="deepspeed: file of nodes and their processes (`node-1 slots=8` a line), relative to the working "
        "directory; `mtkd run` starts them all",
    )
    launcher: Literal["auto", "pdsh", "slurm"] = Field(
        "auto",
        description="how several nodes are started; pdsh: those of the hostfile, over ssh; slurm: those of the "
        "allocation, with srun; auto: pdsh with a hostfile, else this node alone. `mtkd run --no_ssh` is called on "
        "every node",
    )
    timeout_seconds: Annotated[float, Field(ge=1, le=10_000_000)] = Field(
        1800.0,
        description="deepspeed: a run of several processes ends when none of them has finished a step, a batch or a "
        "collective for so long; it must be more than one process ever works alone, e.g. reading the data",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0, description="deepspeed: what is sharded (1 optimizer, 2 gradients, 3 parameters)"
    )
    activation_checkpointing: bool = Field(
        False, description="recompute layers in the backward pass (non-reentrant): less memory, more time"
    )
    tile: Positive | Literal["auto"] = Field(
        "auto",
        description="token positions whose vocabulary-size logits exist at one time; auto: as many as keep one "
        "model's logits below 32 MiB (at most 256 positions) on a CPU and below 256 MiB (at most 4096) on a GPU, "
        "and never fewer than 16, which passes the CPU's limit above 524,288 columns",
    )
    prefetch: bool = Field(
        True,
        description="offloaded teachers: bring the next one's weights while one runs; on a GPU memory for two of them",
    )
    compile: bool = Field(
        False,
        description="torch.compile of the student and of resident teachers, kind: torch; no gain measured on a CPU",
    )
    attention: Literal["auto", "flash", "efficient", "math"] = Field(
        "auto",
        description="kernel of scaled dot product attention; auto: torch chooses; CPUs have flash and math; on a GPU "
        "flash takes bf16 and no mask: batches without padding and packing only, torch refuses others at the first "
        "step",
    )
    threads: Annotated[int, Field(ge=0, le=4096)] = Field(
        0, description="CPU threads per process; 0 = $OMP_NUM_THREADS if set, else cores / processes"
    )
    gpu_memory_gb: Gigabytes | None = Field(
        None, description="memory of one GPU that `mtkd plan` compares with, 1e9 bytes; default: that of the GPU here"
    )
    host_memory_gb: Gigabytes | None = Field(
        None, description="memory of one host that `mtkd plan` compares with, 1e9 bytes; default: that of this machine"
    )
    processes_per_host: Processes | None = Field(
        None, description="processes that share a host's memory in `mtkd plan`; default: all"
    )

    @model_validator(mode="after")
    def _consistent(self) -> EngineConfig:
        if self.kind == "torch" and self.processes > 1:
            raise ValueError("engine kind 'torch' is one process; use kind: deepspeed for more")
        if self.kind == "torch" and self.zero_stage > 0:
            raise ValueError("zero_stage needs kind: deepspeed")
        if self.kind == "torch" and (self.hostfile is not None or self.launcher != "auto"):
            raise ValueError("hostfile and launcher need kind: deepspeed")
        if self.launcher == "pdsh" and self.hostfile is None:
            raise ValueError("launcher: pdsh needs a hostfile: the nodes to start")
        if self.launcher == "slurm" and self.hostfile is not None:
            raise ValueError("launcher: slurm takes the nodes of the allocation; leave out hostfile")
        if self.hostfile is not None and self.processes > 1:
            raise ValueError("processes and hostfile exclude each other: the hostfile's slots are the processes")
        if self.compile and self.kind != "torch":
            raise ValueError("compile needs kind: torch: DeepSpeed's hooks would break every graph")
        if self.compile and self.activation_checkpointing:
            raise ValueError(
                "compile and activation_checkpointing exclude each other: layers are recomputed uncompiled"
            )
        if self.attention == "efficient" and self.device == "cpu":
            raise ValueError("attention: efficient exists on GPUs only; on a CPU: auto, flash or math")
        if self.attention == "flash" and self.device == "cuda" and self.precision == "fp32":
            raise ValueError("attention: flash has no kernel for fp32 on a GPU; use precision: bf16, or another kernel")
        return self

    @property
    def decided_precision(self) -> Literal["fp32", "bf16"]:
        """The precision after `mtkd.engine.precision` has replaced "auto", which comes before any use."""
        assert self.precision != "auto", "mtkd.engine.precision.with_precision comes first"
        return self.precision

    @property
    def in_bf16(self) -> bool:
        """Whether models run under autocast."""
        return self.decided_precision == "bf16"
