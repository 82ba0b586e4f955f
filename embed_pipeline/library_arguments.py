"""The libraries' own training arguments, which a YAML may give by their names: which there are, and which are ours.

Read off the installed packages' source, not imported: loading a pipeline's definitions must not take torch's seconds.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embed_pipeline.errors import ConfigurationError

if TYPE_CHECKING:
    from embed_pipeline.settings import EmbedderSettings, RerankerSettings, TrainingSettings

ModelKind = Literal["embedder", "reranker"]
Part = Literal["training", "data", "model"]  # FlagEmbedding has three classes of arguments, the other library one

_TRANSFORMERS = ("transformers/training_args.py", "TrainingArguments")
_BASE = ("sentence_transformers/base/training_args.py", "BaseTrainingArguments")
_CLASSES: Mapping[tuple[str, ModelKind], Mapping[Part, tuple[tuple[str, str], ...]]] = {
    ("sentence-transformers", "embedder"): {
        "training": (
            _TRANSFORMERS,
            _BASE,
            (
                "sentence_transformers/sentence_transformer/training_args.py",
                "SentenceTransformerTrainingArguments",
            ),
        )
    },
    ("sentence-transformers", "reranker"): {
        "training": (
            _TRANSFORMERS,
            _BASE,
            ("sentence_transformers/cross_encoder/training_args.py", "CrossEncoderTrainingArguments"),
        )
    },
    ("flag-embedding", "embedder"): {
        "training": (
            _TRANSFORMERS,
            ("FlagEmbedding/abc/finetune/embedder/AbsArguments.py", "AbsEmbedderTrainingArguments"),
        ),
        "data": (("FlagEmbedding/abc/finetune/embedder/AbsArguments.py", "AbsEmbedderDataArguments"),),
        "model": (("FlagEmbedding/abc/finetune/embedder/AbsArguments.py", "AbsEmbedderModelArguments"),),
    },
    ("flag-embedding", "reranker"): {
        "training": (
            _TRANSFORMERS,
            ("FlagEmbedding/abc/finetune/reranker/AbsArguments.py", "AbsRerankerTrainingArguments"),
        ),
        "data": (("FlagEmbedding/abc/finetune/reranker/AbsArguments.py", "AbsRerankerDataArguments"),),
        "model": (("FlagEmbedding/abc/finetune/reranker/AbsArguments.py", "AbsRerankerModelArguments"),),
    },
}

# What a key of our own decides already.
_OUR_KEYS: Mapping[str, str] = {
    "num_train_epochs": "epochs",
    "max_steps": "max_steps",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "warmup_ratio": "warmup_ratio",
    "warmup_steps": "warmup_ratio",
    "lr_scheduler_type": "scheduler",
    "max_grad_norm": "max_grad_norm",
    "bf16": "precision",
    "fp16": "precision",
    "gradient_checkpointing": "gradient_checkpointing",
    "gradient_checkpointing_kwargs": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing",
    "logging_steps": "logging_steps",
    "ddp_timeout": "collective_timeout_minutes",
    "batch_sampler": "batch_sampler",
    "multi_dataset_batch_sampler": "multi_dataset_batch_sampler",
    "prompts": "encoding.query_prompt and encoding.passage_prompt",
    "router_mapping": "encoding.query_max_length and encoding.passage_max_length",
    "max_length": "encoding.query_max_length and encoding.passage_max_length",
    "temperature": "temperature",
    "negatives_cross_device": "negatives_cross_device",
    "sub_batch_size": "sub_batch_size",
    "sentence_pooling_method": "encoding.pooling",
    "normalize_embeddings": "encoding.normalize, which is always true",
    "train_group_size": "train_group_size",
    "query_max_len": "query_max_length",
    "passage_max_len": "passage_max_length",
    "max_len": "query_max_length and passage_max_length",
    "query_instruction_format": "encoding.query_instruction_for_retrieval, as it stands before the text",
    "passage_instruction_format": "encoding.passage_instruction_for_retrieval, as it stands before the text",
    "query_instruction_for_retrieval": "encoding.query_instruction_for_retrieval",
    "passage_instruction_for_retrieval": "encoding.passage_instruction_for_retrieval",
    "knowledge_distillation": "knowledge_distillation",
    "model_name_or_path": "base_model",
    "config_name": "base_model",
    "tokenizer_name": "base_model",
    "trust_remote_code": "base_model.trust_remote_code",
    "train_data": "source and extra_sources",
}
# What the pipeline itself decides, and why.
_OUTPUT = "the store decides where a training writes; what it leaves is a version"
_REPORTING = "figures go to the training log, Dagster and MLflow by themselves"
_DEV = "the dev set, `evaluations` and `early_stopping_patience` decide what is measured and which weights are kept"
_RESUME = "checkpoints are the pipeline's own, and exact; see checkpoint_minutes"
_HUB = "the asset `hub` pushes, behind the gate"
_SEED = "the pipeline's `seed` is part of every version"
_PLACE = "torchrun and the hardware decide it; see nproc_per_node"
_FORM = "every process holds the whole model"
_SAFE = "what watches the training needs it as it is"
_BATCH = "the batch size decides the weights and is part of every version"
_ORDER = "neither library's batches are composed by it: one ignores it, the other has no lengths to go by"
_SAVED = "a reranker's folder does not hold it, so it would be missing when the model is used"
_REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        ("output_dir", "overwrite_output_dir", "logging_dir", "run_name", "cache_dir", "cache_path"), _OUTPUT
    ),
    **dict.fromkeys(("report_to", "project", "trackio_space_id", "disable_tqdm", "log_level"), _REPORTING),
    **dict.fromkeys(("log_level_replica", "log_on_each_node", "logging_strategy", "logging_first_step"), _REPORTING),
    **dict.fromkeys(("do_train", "do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_delay"), _DEV),
    **dict.fromkeys(("eval_on_start", "eval_accumulation_steps", "per_device_eval_batch_size"), _DEV),
    **dict.fromkeys(("batch_eval_metrics", "prediction_loss_only", "include_for_metrics"), _DEV),
    **dict.fromkeys(("eval_do_concat_batches", "eval_use_gather_object", "bf16_full_eval", "fp16_full_eval"), _DEV),
    **dict.fromkeys(
        ("save_strategy", "save_steps", "save_total_limit", "save_on_each_node", "save_only_model"), _RESUME
    ),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _DEV),
    **dict.fromkeys(("resume_from_checkpoint", "restore_callback_states_from_checkpoint"), _RESUME),
    **dict.fromkeys(("ignore_data_skip", "enable_jit_checkpoint"), _RESUME),
    **dict.fromkeys(("seed", "data_seed", "full_determinism"), _SEED),
    **dict.fromkeys(("use_cpu", "local_rank", "ddp_backend", "accelerator_config"), _PLACE),
    **dict.fromkeys(("ddp_find_unused_parameters", "ddp_broadcast_buffers", "ddp_static_graph"), _PLACE),
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config"), _FORM),
    **dict.fromkeys(("logging_nan_inf_filter", "dataloader_drop_last", "remove_unused_columns"), _SAFE),
    **dict.fromkeys(("query_instruction_for_rerank", "passage_instruction_for_rerank", "sep_token"), _SAVED),
    **dict.fromkeys(("trackio_bucket_id", "trackio_static_space_id"), _REPORTING),
    "auto_find_batch_size": _BATCH,
    **dict.fromkeys(("train_sampling_strategy", "length_column_name"), _ORDER),
    "model_type": "encoder-only models are trained here",
    **dict.fromkeys(("label_names", "label_smoothing_factor", "token"), _SAFE),
}

_PLAIN = {"str": str, "int": int, "float": float, "bool": bool, "None": type(None)}


def check_arguments(kind: ModelKind, settings: TrainingSettings) -> str | None:
    """Why `settings.arguments` cannot be given to the engine's library; None if they can.

    A name that the installed version does not have, that another key decides, or a plain value of another type.
    """
    known = _known(settings.engine, kind)
    for name, value in settings.arguments.items():
        if name in _REFUSED or name.startswith(("hub_", "push_to_hub")):
            return f"{name} is not for a YAML: {_REFUSED.get(name, _HUB)}"
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            return f"the installed {settings.engine} has no training argument '{name}' for {kind}s.{hint}"
        if name in _OUR_KEYS:
            return f"{name} is decided by `{_OUR_KEYS[name]}`; set that instead"
        types = _plain_types(known[name])
        # A whole number is a float as well, and true is no number.
        fits = isinstance(value, types) or (float in types and isinstance(value, int))
        if types and (not fits or (isinstance(value, bool) and bool not in types)):
            return f"{name} is {known[name]} in the installed {settings.engine}; found {value!r}"
    return None


def arguments_for(settings: EmbedderSettings | RerankerSettings | TrainingSettings, part: Part) -> dict[str, Any]:
    """The given arguments that belong to one of the library's classes."""
    from embed_pipeline.settings import RerankerSettings

    kind: ModelKind = "reranker" if isinstance(settings, RerankerSettings) else "embedder"
    fields = _fields(settings.engine, kind, part)
    return {name: value for name, value in settings.arguments.items() if name in fields}


def passed_through(engine: str, kind: ModelKind) -> list[str]:
    """The names that `arguments` may hold, for the documentation."""
    refused = {*_REFUSED, *_OUR_KEYS}
    return sorted(
        name
        for name in _known(engine, kind)
        if name not in refused and not name.startswith(("hub_", "push_to_hub", "_"))
    )


def _known(engine: str, kind: ModelKind) -> dict[str, str]:
    parts: tuple[Part, ...] = ("training", "data", "model")
    return {name: told for part in parts for name, told in _fields(engine, kind, part).items()}


@functools.cache
def _fields(engine: str, kind: ModelKind, part: Part) -> dict[str, str]:
    """Field -> annotation, of one part's classes; empty where the library has no such part."""
    found: dict[str, str] = {}
    for file, name in _CLASSES[engine, kind].get(part, ()):
        found |= _annotated(file, name)
    return found


@functools.cache
def _annotated(file: str, name: str) -> dict[str, str]:
    package = file.split("/", 1)[0]
    spec = importlib.util.find_spec(package)  # finds the package without importing it
    if spec is None or spec.origin is None:
        raise ConfigurationError(f"{package} is not installed, so its training arguments are not known")
    source = Path(spec.origin).parent.parent / file
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            fields = [
                item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            ]
            return {
                field.target.id: ast.unparse(field.annotation) for field in fields if isinstance(field.target, ast.Name)
            }
    raise ConfigurationError(f"{source} has no class {name}: this version of {package} is not one we know")


def _plain_types(annotation: str) -> tuple[type, ...]:
    """The Python types that an annotation of plain ones allows; empty where it holds anything else."""
    try:
        tree = ast.parse(annotation.strip("'\""), mode="eval")
    except SyntaxError:
        return ()
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    constants = {str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    optional = {"Optional"} & names
    plain = (names | constants) - {"Optional", "Union"}
    if not plain <= set(_PLAIN):
        return ()
    return tuple({*(_PLAIN[name] for name in plain), *((type(None),) if optional else ())})
