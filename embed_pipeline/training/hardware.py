"""What a training does because of the hardware that it finds: decided here, overruled by the user's `arguments`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import TrainingArguments
from transformers.utils import is_torch_tf32_available

from embed_pipeline.losses import BatchSampler
from embed_pipeline.models.bfloat16 import speedup

LOADER_PROCESSES = 4  # tokenize faster than any GPU trains; more only take memory


@dataclass(frozen=True)
class Hardware:
    """What one rank has of its machine."""

    device: str  # cpu, mps or cuda:<local rank>
    tf32: bool  # whether its tensor cores take it: NVIDIA's from Ampere on
    cores: int  # this rank's share
    bfloat16_speedup: float | None = None  # products in it over products in float32, on a CPU


def look(device: str, cores: int) -> Hardware:
    on_cpu = device == "cpu"
    return Hardware(
        device, device.startswith("cuda") and is_torch_tf32_available(), cores, speedup() if on_cpu else None
    )


def arguments_of(hardware: Hardware) -> dict[str, Any]:
    """What of TrainingArguments follows from the hardware; nothing on a CPU, where the libraries' own are right.

    `models.precision` and, for a CPU's attention, `modules.set_up_for_training` decide the rest. Left to the libraries,
    because theirs are what one would choose: fused AdamW, pinned memory, and on GPUs scaled-dot-product attention,
    which runs in one kernel: flash attention, or torch's memory-efficient one where texts are padded. Rows are the same
    however many processes load them: samplers draw in the rank itself, and SeededRows draws by row.
    """
    if not hardware.device.startswith("cuda"):
        return {}
    arguments: dict[str, Any] = {
        # Tokenizing in the rank itself would keep its GPU waiting; one core is for the rank.
        "dataloader_num_workers": max(0, min(LOADER_PROCESSES, hardware.cores - 1))
    }
    if hardware.tf32:
        arguments["tf32"] = True  # for the products that autocast leaves in float32, and with precision: float32
    return arguments


def batch_sampler_of(
    hardware: Hardware, asked: BatchSampler | None, suited: BatchSampler, kind: Literal["embedder", "reranker"]
) -> BatchSampler:
    """The sampler of one source: the one asked for, or the one that suits its loss.

    On a GPU a reranker's rows, which are scored by themselves, are grouped by length: nothing is learnt from a batch's
    other rows, and half of a random batch of passages can be padding. Where a batch's rows are each other's negatives
    or classes (`suited` says so), grouping would change what is learnt, and is not done even if asked for. Embedders'
    other losses are left as their authors have them.
    """
    alone = suited == "batch_sampler"
    if asked == "group_by_length":
        return asked if alone else suited
    if asked is None and alone and kind == "reranker" and hardware.device.startswith("cuda"):
        return "group_by_length"
    return asked or suited


@dataclass(frozen=True)
class InForce:
    """What a training runs with in the end, the user's `arguments` included."""

    optimizer: str
    attention: str  # the implementation
    tf32: bool  # for what stays float32
    loader_processes: int  # of each rank; 0: it loads its rows itself
    pinned_memory: bool
    bfloat16_speedup: float | None  # of products, as measured on this machine; on a CPU

    def told(self, precision: str, device: str) -> str:
        """As a line of the log."""
        parts = [f"{precision} on {device}"]
        if self.tf32:
            parts.append("TF32 for what stays float32")
        parts += [self.optimizer, f"attention: {self.attention}"]
        if self.loader_processes:
            parts.append(f"{self.loader_processes} processes load rows")
        if self.pinned_memory:
            parts.append("pinned memory")
        if self.bfloat16_speedup is not None:
            parts.append(f"products here are {self.bfloat16_speedup:.1f} times as fast in bfloat16 as in float32")
        return ", ".join(parts)


def in_force(arguments: TrainingArguments, model: Any, hardware: Hardware) -> InForce:
    """`model` is in sentence-transformers' form."""
    config = getattr(model[0].model, "config", None)
    return InForce(
        optimizer=str(getattr(arguments.optim, "value", arguments.optim)),
        attention=str(getattr(config, "_attn_implementation", None) or "the model's own"),
        tf32=bool(arguments.tf32),
        loader_processes=arguments.dataloader_num_workers,
        pinned_memory=arguments.dataloader_pin_memory,
        bfloat16_speedup=hardware.bfloat16_speedup,
    )
