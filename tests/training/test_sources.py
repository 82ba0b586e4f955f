"""Several sources in one training, every loss on every kind of source that it is offered for, adapters and freezing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from small_problem import Trained

from embed_pipeline.errors import TrainingError
from embed_pipeline.losses import EMBEDDER_LOSSES, RERANKER_LOSSES, RETRIEVAL_KINDS
from embed_pipeline.settings import ExtraSourceSettings
from embed_pipeline.training.data_sets import RowSettings, data_set
from embed_pipeline.training.job import EmbedderJob, TrainingJob
from embed_pipeline.training.sources import read_embedder_sources

Train = Callable[..., Trained]
# The problem's source of each example kind, by the rows that a loss wants.
EXTRA = {"scored": "sts", "classes": "entailment", "text_classes": "topics", "embeddings": "translated"}
KINDS = {"sts": "scored", "entailment": "labelled", "duplicates": "labelled", "topics": "labelled"}
KINDS |= {"translated": "parallel", "faq": "pairs"}


def source(name: str, model: Path, **told: Any) -> ExtraSourceSettings:
    """An extra source of the problem."""
    loss = told.get("loss")
    if loss is not None:
        needs = EMBEDDER_LOSSES[loss].needs
        told |= {key: {"path": str(model)} for key in ("guide", "teacher") if key in needs}
    return ExtraSourceSettings.model_validate({"name": name, "kind": KINDS[name], "path": "x", **told})


def with_sources(*sources: ExtraSourceSettings, model: Path | None = None) -> Callable[[TrainingJob], TrainingJob]:
    folders = {one.name: model for one in sources}

    def change(job: TrainingJob) -> TrainingJob:
        changed: dict[str, Any] = {"extra_sources": sources}
        if isinstance(job, EmbedderJob):
            changed["guides"] = {name: f for name, f in folders.items() if f is not None}
            changed["teachers"] = changed["guides"]
        return job.model_copy(update=changed)

    return change


RETRIEVAL = [name for name, loss in EMBEDDER_LOSSES.items() if "pairs" in loss.rows]
EXAMPLES = [
    (name, "duplicates" if rows == "classes" and "two_classes" in loss.needs else EXTRA[rows])
    for name, loss in EMBEDDER_LOSSES.items()
    for kind, rows in loss.rows.items()
    if kind not in RETRIEVAL_KINDS
]


@pytest.mark.parametrize("loss", RETRIEVAL)
def test_every_loss_for_retrieval_trains(train_here: Train, tiny_bert_folder: Path, loss: str) -> None:
    folders = {"shop": tiny_bert_folder}
    needed = {key: {"path": "x"} for key in ("guide", "teacher") if key in EMBEDDER_LOSSES[loss].needs}
    trained = train_here(
        "embedder",
        lambda job: job.model_copy(update={"guides": folders, "teachers": folders}),
        loss=loss,
        max_steps=2,
        evaluations=1,
        **needed,
    )
    assert trained.summary["steps"] == 2
    assert trained.log[1]["grad_norm"] > 0


@pytest.mark.parametrize(("loss", "name"), EXAMPLES)
def test_every_loss_for_examples_trains_beside_retrieval(
    train_here: Train, tiny_bert_folder: Path, loss: str, name: str
) -> None:
    extra = source(name, tiny_bert_folder, loss=loss)
    trained = train_here(
        "embedder",
        with_sources(extra, model=tiny_bert_folder),
        max_steps=2,
        evaluations=1,
        multi_dataset_batch_sampler="round_robin",
    )
    assert trained.summary["steps"] == 2
    assert trained.summary["rows"] == {"shop": 49, name: 48}
    dev = [key for key in trained.log[0] if key.startswith(f"dev_{name}/")]
    assert dev, trained.log[0]


@pytest.mark.parametrize("loss", RERANKER_LOSSES)
def test_every_loss_of_a_reranker_trains(train_here: Train, loss: str) -> None:
    assert train_here("reranker", loss=loss, max_steps=2, evaluations=1).summary["steps"] == 2


@pytest.mark.parametrize(
    ("name", "loss"), [("sts", "MSELoss"), ("sts", "BinaryCrossEntropyLoss"), ("duplicates", "BinaryCrossEntropyLoss")]
)
def test_a_reranker_learns_examples_too(train_here: Train, tiny_bert_folder: Path, name: str, loss: str) -> None:
    extra = source(name, tiny_bert_folder, reranker_loss=loss)
    trained = train_here("reranker", with_sources(extra), max_steps=3, evaluations=1)
    assert trained.summary["rows"][name] == 48
    assert any(key.startswith(f"dev_{name}/") for key in trained.log[0])


@pytest.mark.parametrize("loss", [None, "TripletLoss"])
def test_each_wrapper_of_a_loss_trains_what_no_other_does(train_here: Train, loss: str | None) -> None:
    """A wrapper that is left out, or taken for another, gives the same weights as that one."""
    dimensions = {"matryoshka_dims": [32, 16, 8]}
    wrappers: dict[str | None, dict[str, Any]] = {
        None: {},
        "MatryoshkaLoss": dimensions,
        "AdaptiveLayerLoss": {},
        "Matryoshka2dLoss": dimensions,
    }
    weights = {}
    for wrapper, arguments in wrappers.items():
        trained = train_here(
            "embedder", loss=loss, loss_wrapper=wrapper, loss_wrapper_arguments=arguments, max_steps=2, evaluations=1,
            preflight=False,
        )  # fmt: skip
        assert trained.summary["steps"] == 2
        weights[wrapper] = load_file(trained.model / "model.safetensors")
    for one, other in itertools.combinations(weights, 2):
        different = [name for name, value in weights[one].items() if not value.equal(weights[other][name])]
        assert len(different) > 10, (one, other)


def test_both_engines_take_extra_retrieval_sources(train_here: Train, tiny_bert_folder: Path) -> None:
    for engine in ("sentence-transformers", "flag-embedding"):
        trained = train_here(
            "embedder", with_sources(source("faq", tiny_bert_folder)), engine=engine, max_steps=3, evaluations=1
        )
        assert set(trained.summary["rows"]) == {"shop", "faq"}
        assert "dev_faq/ndcg_at_10" in trained.log[0]


@pytest.mark.parametrize("kind", ["embedder", "reranker"])
def test_flag_embedding_learns_a_teachers_scores(train_here: Train, kind: str) -> None:
    settings = {"engine": "flag-embedding", "max_steps": 2, "evaluations": 1}
    taught = train_here(kind, knowledge_distillation=True, **settings)
    without = train_here(kind, **settings)
    first, second = (load_file(one.model / "model.safetensors") for one in (taught, without))
    assert any(not first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize("engine", ["sentence-transformers", "flag-embedding"])
@pytest.mark.parametrize("kind", ["embedder", "reranker"])
def test_adapters_are_merged_and_leave_the_rest_as_it_was(
    train_here: Train, tiny_bert_folder: Path, kind: str, engine: str
) -> None:
    trained = train_here(
        kind, engine=engine, lora={"r": 4, "target_modules": ["query", "value"]}, max_steps=3, evaluations=1
    )
    before, after = load_file(tiny_bert_folder / "model.safetensors"), load_file(trained.model / "model.safetensors")
    after = {name.removeprefix("bert."): value for name, value in after.items()}
    changed = {name for name in before if name in after and not before[name].equal(after[name])}
    assert changed == {f"encoder.layer.{i}.attention.self.{part}.weight" for i in (0, 1) for part in ("query", "value")}
    assert not [name for name in after if "lora" in name]


def test_what_is_frozen_stays(train_here: Train, tiny_bert_folder: Path) -> None:
    trained = train_here("embedder", freeze={"embeddings": True, "layers": 1}, max_steps=3, evaluations=1)
    before, after = load_file(tiny_bert_folder / "model.safetensors"), load_file(trained.model / "model.safetensors")
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved
    assert all(name.startswith("encoder.layer.1.") for name in moved)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze": {"layers": 3}}, "freeze.layers: 3, but the model has 2 layers"),
        ({"lora": {"target_modules": ["nowhere"]}}, "lora: .*nowhere.*Name the layers under lora.target_modules"),
        ({"loss": "TripletLoss", "train_group_size": 1}, "TripletLoss needs negatives: set train_group_size"),
        ({"loss": "TripletLoss", "loss_arguments": {"distance_metric": "l7"}}, "knows cosine, euclidean, manhattan"),
        ({"loss_arguments": {"partition_mode": "nonsense"}}, "does not take these arguments"),
    ],
)
def test_refusals(train_here: Train, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=f"(?s){message}"):
        train_here("embedder", max_steps=1, **settings)


def test_classes_that_nobody_called_alike_are_refused(train_here: Train, tiny_bert_folder: Path) -> None:
    extra = source("entailment", tiny_bert_folder, loss="ContrastiveLoss")
    with pytest.raises(TrainingError, match=r"needs to know which class means alike.*0, 1, 2.*positive_label"):
        train_here("embedder", with_sources(extra), max_steps=1)


def test_arguments_reach_the_libraries(train_here: Train) -> None:
    for engine in ("sentence-transformers", "flag-embedding"):
        settings = {"engine": engine, "max_steps": 2, "evaluations": 1}
        plain = train_here("embedder", **settings)
        told = train_here("embedder", arguments={"optim": "adafactor"}, **settings)
        first, second = (load_file(one.model / "model.safetensors") for one in (plain, told))
        assert any(not first[name].equal(second[name]) for name in first)


def test_margins_of_cosines_are_taught_by_probabilities(job_of: Callable[..., TrainingJob], tmp_path: Path) -> None:
    job = job_of("embedder", tmp_path, loss="MarginMSELoss", train_group_size=2)
    assert isinstance(job, EmbedderJob)
    rows = data_set(read_embedder_sources(job)[0], RowSettings(2))
    assert all(0.0 < score < 1.0 for label in rows["label"] for score in label)
    assert len(rows) == 48  # of 49: the query without negatives has a random one, which no teacher has scored
    logits = data_set(
        read_embedder_sources(job_of("embedder", tmp_path, loss="DistillKLDivLoss", train_group_size=2))[0],  # type: ignore[arg-type]
        RowSettings(2),
    )
    assert logits["label"][0][0] == 4.0


def test_two_processes_learn_from_the_same_source_in_a_step(train: Train, tiny_bert_folder: Path) -> None:
    """With negatives gathered across processes, and a head of SoftmaxLoss that DDP does not know: both end the same."""
    sources = [source("entailment", tiny_bert_folder, loss="SoftmaxLoss"), source("faq", tiny_bert_folder)]
    trained = train("embedder", world_size=2, change=with_sources(*sources), max_steps=9, evaluations=1)
    assert trained.summary["steps"] == 9
    assert trained.summary["rows"] == {"shop": 49, "entailment": 48, "faq": 49}
