"""A model of what more GPUs give a training, written as formulas: `python benchmarks/scaling.py` prints its tables.

No GPU was measured for it. What it counts (operations, bytes) `--check` compares with what torch counts in a real step
on this machine's CPU, of one process and of two; how long that takes on GPUs follows from the constants of `Cluster`,
which are assumptions. benchmarks/README.md says what is in each term and what to read from the tables.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FLOAT32 = 4  # bytes; gradients, optimizer and gathered embeddings are float32 whatever the arithmetic


@dataclass(frozen=True)
class Model:
    name: str
    layers: int
    hidden: int
    vocabulary: int
    positions: int
    efficiency: float  # share of the GPU's peak that its matrix products reach; narrow models reach less

    @property
    def embedding_parameters(self) -> int:
        """Words, positions, two token types, their norm."""
        return (self.vocabulary + self.positions + 2 + 2) * self.hidden

    @property
    def layer_parameters(self) -> int:
        """Four projections of attention, two of four times the width, biases, two norms; of all layers."""
        return self.layers * (12 * self.hidden**2 + 13 * self.hidden)

    @property
    def parameters(self) -> int:
        return self.embedding_parameters + self.layer_parameters


@dataclass(frozen=True)
class Step:
    batch_size: int  # queries a process, of one forward pass
    group_size: int  # passages a query
    query_tokens: int  # after padding
    passage_tokens: int
    accumulation: int = 1
    gather: bool = True  # negatives_cross_device
    recomputed: bool = False  # gradient caching or checkpointing: the forward pass runs twice
    embeddings_frozen: bool = False

    @property
    def tokens(self) -> int:
        """Of a process and one forward pass."""
        return self.batch_size * (self.query_tokens + self.group_size * self.passage_tokens)


@dataclass(frozen=True)
class Cluster:
    """One kind of GPU and of network. Bytes and operations are a second's."""

    name: str
    node_gpus: int = 8
    peak: float = 989e12  # H100 SXM, bfloat16 without sparsity
    inside: float = 350e9  # all-reduce bus bandwidth over NVLink 4, of 450e9
    between: float = 350e9  # of a node with eight 400 Gb/s adapters, one a GPU: eight rings side by side
    start_inside: float = 20e-6  # seconds until a collective moves
    start_between: float = 60e-6
    overhead: float = 12e-3  # seconds a forward and backward pass: starting kernels, Python, the optimizer
    bucket: int = 25 * 2**20  # bytes that DDP exchanges at once


FAST = Cluster("8 x 400 Gb/s a node")
SLOW = Cluster("100 Gb/s a node", between=11e9)

MODELS = (
    Model("MiniLM-L6 (23 M)", 6, 384, 30_522, 512, efficiency=0.15),
    Model("bge-base (109 M)", 12, 768, 30_522, 512, efficiency=0.35),
    Model("bge-m3 (567 M)", 24, 1024, 250_002, 8_194, efficiency=0.45),
)


# ---------------------------------------------------------------------------------------------- counted


def forward_flops(model: Model, texts: int, tokens: int) -> float:
    """Of the layers on `texts` texts of `tokens` tokens: 2 a weight and token, and the two products of attention."""
    weights = 12 * model.hidden**2
    attention = 4 * tokens * model.hidden / 2  # 2 x tokens x hidden multiply-adds, for the scores and for the values
    return 2.0 * model.layers * texts * tokens * (weights + attention)


def encoder_flops(model: Model, step: Step) -> float:
    """Of a process and one pass, forward and backward (twice the forward)."""
    queries = forward_flops(model, step.batch_size, step.query_tokens)
    passages = forward_flops(model, step.batch_size * step.group_size, step.passage_tokens)
    return (queries + passages) * (4 if step.recomputed else 3)


def score_flops(model: Model, step: Step, processes: int, whole_matrix: bool) -> float:
    """Of the similarities. sentence-transformers scores a process's own queries; FlagEmbedding, all with all."""
    seen = processes if step.gather else 1
    queries = step.batch_size * (seen if whole_matrix else 1)
    return 3 * 2.0 * queries * step.batch_size * step.group_size * seen * model.hidden


def score_bytes(step: Step, processes: int, whole_matrix: bool) -> int:
    """Of one matrix of similarities; about three are held."""
    seen = processes if step.gather else 1
    queries = step.batch_size * (seen if whole_matrix else 1)
    return FLOAT32 * queries * step.batch_size * step.group_size * seen


def gradient_bytes(model: Model, step: Step) -> int:
    """What a process hands to the all-reduce, once a step however much is accumulated."""
    return FLOAT32 * (model.layer_parameters + (0 if step.embeddings_frozen else model.embedding_parameters))


def gathered_bytes(model: Model, step: Step) -> int:
    """A process's own embeddings of one pass: handed out forward, and as many gradients come back."""
    return FLOAT32 * step.batch_size * (1 + step.group_size) * model.hidden if step.gather else 0


# ------------------------------------------------------------------------------------------------ timed


@dataclass(frozen=True)
class Timed:
    """Seconds of one step of one process."""

    compute: float
    overhead: float
    gradients: float  # the all-reduce, alone
    exposed: float  # what of it nothing hides
    gather: float

    @property
    def total(self) -> float:
        return self.compute + self.overhead + self.exposed + self.gather


def timed(model: Model, step: Step, processes: int, cluster: Cluster, *, whole_matrix: bool = False) -> Timed:
    """DDP shares a gradient when it is complete, and a parameter's is when the backward pass has left it for good.

    Queries and passages are encoded one after the other by the same weights, so until the last of the backward passes,
    that of the queries, no gradient is complete: only this part of the computation hides the exchange. The words'
    embeddings come last of all, and nothing hides theirs.
    """
    rate = cluster.peak * model.efficiency
    flops = encoder_flops(model, step) + score_flops(model, step, processes, whole_matrix)
    compute = step.accumulation * flops / rate
    if processes == 1:
        return Timed(compute, step.accumulation * cluster.overhead, 0.0, 0.0, 0.0)
    several = processes > cluster.node_gpus
    speed = min(cluster.inside, cluster.between) if several else cluster.inside
    start = cluster.start_between if several else cluster.start_inside
    around = (processes - 1) / processes
    all_bytes = gradient_bytes(model, step)
    late = 0 if step.embeddings_frozen else FLOAT32 * model.embedding_parameters
    gradients = 2 * around * all_bytes / speed + start * math.ceil(all_bytes / cluster.bucket)
    last = 2 * around * late / speed
    backward_of_queries = 2 * forward_flops(model, step.batch_size, step.query_tokens) / rate
    exposed = last + max(0.0, gradients - last - backward_of_queries)
    # All the others' embeddings, forward and backward, each column by itself.
    columns = 1 + step.group_size
    moved = 2 * (processes - 1) * gathered_bytes(model, step) / speed
    gather = step.accumulation * (moved + 2 * columns * start) if step.gather else 0.0
    return Timed(compute, step.accumulation * cluster.overhead, gradients, exposed, gather)


def efficiency(model: Model, step: Step, processes: int, cluster: Cluster) -> float:
    """Samples a second and process over those of one process alone, at the same batch a process."""
    return timed(model, step, 1, cluster).total / timed(model, step, processes, cluster).total


def dev_share(model: Model, step: Step, processes: int, cluster: Cluster, rows: int) -> float:
    """Share of an epoch of `rows` rows that goes into measuring: five dev evaluations of the default sizes.

    The processes share the encoding; each searches and computes the figures, on its CPU, in the time seen on one core.
    """
    questions, passages = 500, 2_000
    flops = forward_flops(model, questions, step.query_tokens) + forward_flops(model, passages, step.passage_tokens)
    tokenizing, figures = 0.7, 0.3
    waiting = 5 * ((flops / (cluster.peak * model.efficiency) + tokenizing) / processes + figures)
    steps = rows / (step.batch_size * step.accumulation * processes)
    return waiting / (waiting + steps * timed(model, step, processes, cluster).total)


# ----------------------------------------------------------------------------------------------- tables

USUAL = Step(batch_size=64, group_size=5, query_tokens=32, passage_tokens=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare operations and bytes with torch's own counts")
    parser.add_argument("--bytes", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.check or given.bytes:
        check() if given.check else print_counted_bytes()
        return
    print(counted_table())
    print()
    print(scaling_table())
    print()
    print(remedies_table())


def counted_table() -> str:
    lines = [
        "| model | TFLOP a step | gradients, MB | of them words | own embeddings, MB | scores at 64, MB: own, all |",
        "|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        words = model.embedding_parameters / model.parameters
        own, whole = (score_bytes(USUAL, 64, matrix) / 1e6 for matrix in (False, True))
        lines.append(
            f"| {model.name} | {encoder_flops(model, USUAL) / 1e12:.2f} | {gradient_bytes(model, USUAL) / 1e6:.0f} "
            f"| {words:.0%} | {gathered_bytes(model, USUAL) / 1e6:.2f} | {own:.0f}, {whole:.0f} |"
        )
    return "\n".join(lines)


def scaling_table() -> str:
    lines = [
        "| model | GPUs | network | step, ms | compute | overhead | gradients not hidden | gather | efficiency | dev |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for processes, cluster in ((1, FAST), (8, FAST), (64, FAST), (64, SLOW)):
            found = timed(model, USUAL, processes, cluster)
            network = cluster.name if processes > cluster.node_gpus else "NVLink" if processes > 1 else "-"
            lines.append(
                f"| {model.name} | {processes} | {network} | {1e3 * found.total:.1f} | {1e3 * found.compute:.1f} "
                f"| {1e3 * found.overhead:.0f} | {1e3 * found.exposed:.1f} | {1e3 * found.gather:.1f} "
                f"| {efficiency(model, USUAL, processes, cluster):.0%} "
                f"| {dev_share(model, USUAL, processes, cluster, 1_000_000):.0%} |"
            )
    return "\n".join(lines)


def remedies_table() -> str:
    """Efficiency at 64 GPUs over the slow network, each remedy by itself."""
    remedies = {
        "as it is": USUAL,
        "gather off": replace(USUAL, gather=False),
        "accumulation 4": replace(USUAL, accumulation=4),
        "batch x 4": replace(USUAL, batch_size=256),
        "batch x 4, caching": replace(USUAL, batch_size=256, recomputed=True),
        "words frozen": replace(USUAL, embeddings_frozen=True),
    }
    lines = [
        f"| model | {' | '.join(remedies)} |",
        f"|---|{'---|' * len(remedies)}",
    ]
    for model in MODELS:
        shares = (f"{efficiency(model, step, 64, SLOW):.0%}" for step in remedies.values())
        lines.append(f"| {model.name} | {' | '.join(shares)} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ check

CHECKED = Step(batch_size=8, group_size=3, query_tokens=16, passage_tokens=48)
SMALL = Model("2 layers of 128", 2, 128, 1_000, 64, efficiency=1.0)


def check() -> None:
    """Print the formulas' counts beside torch's, of a step of a small BERT on this machine."""
    print("| of a step | formula | torch |\n|---|---|---|")
    print(f"| parameters | {SMALL.parameters:,} | {sum(p.numel() for p in small_bert().parameters()):,} |")
    print(f"| operations | {encoder_flops(SMALL, CHECKED):.5g} | {counted_flops():.5g} |", flush=True)
    torchrun = [sys.executable, "-m", "embed_pipeline.launch.agent", "--rdzv-backend=files", "--nproc-per-node=2"]
    subprocess.run([*torchrun, __file__, "--bytes"], check=True)


def counted_flops() -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        embeddings(small_bert()).square().sum().backward()
    return float(counter.get_total_flops())


def print_counted_bytes() -> None:
    """One of two processes: what DDP hands to the all-reduce, and what is gathered, in one step."""
    from sentence_transformers.util import all_gather_with_grad
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    from embed_pipeline.launch.rank import meet, take_place

    meet(take_place(2), timedelta(minutes=5))
    model = DistributedDataParallel(small_bert())
    shared: list[int] = []

    def count(bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        shared.append(bucket.buffer().nbytes)
        work = distributed.all_reduce(bucket.buffer(), async_op=True)
        assert work is not None
        return work.get_future().then(lambda done: done.value()[0] / 2)

    model.register_comm_hook(None, lambda _, bucket: count(bucket))
    found = embeddings(model)
    all_gather_with_grad(found).square().sum().backward()
    if distributed.get_rank() == 0:
        print(f"| bytes of gradients | {gradient_bytes(SMALL, CHECKED):,} | {sum(shared):,} |")
        print(f"| bytes of own embeddings | {gathered_bytes(SMALL, CHECKED):,} | {found.nbytes:,} |", flush=True)
    distributed.destroy_process_group()


def small_bert() -> torch.nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=SMALL.vocabulary,
        hidden_size=SMALL.hidden,
        num_hidden_layers=SMALL.layers,
        num_attention_heads=4,
        intermediate_size=4 * SMALL.hidden,
        max_position_embeddings=SMALL.positions,
    )
    model = BertModel(config, add_pooling_layer=False)
    model.set_attn_implementation("eager")  # torch counts no operations of a CPU's fused kernel
    return model


def embeddings(model: torch.nn.Module) -> torch.Tensor:
    """Of CHECKED's queries and passages, each column by itself, as sentence-transformers encodes them."""
    import torch

    lengths = [CHECKED.query_tokens, *[CHECKED.passage_tokens] * CHECKED.group_size]
    ids = [torch.randint(SMALL.vocabulary, (CHECKED.batch_size, length)) for length in lengths]
    return torch.cat([model(input_ids=column).last_hidden_state[:, 0] for column in ids])


if __name__ == "__main__":
    main()
