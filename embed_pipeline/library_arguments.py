"""The libraries' own arguments, which a YAML may give by their names: which there are, their values, which are ours.

Read off the installed packages' source, not imported: loading a pipeline's definitions must not take torch's seconds.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import json
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional, Union

from pydantic import TypeAdapter, ValidationError

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

# What a value may be besides what its type says: (lowest, highest), of each number in it.
_ABOVE_ZERO = 1e-9
_RANGES: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0.0, 1.0 - 1e-9)),
    "adam_epsilon": (0.0, 1.0),
    "dataloader_num_workers": (0, 1_024),
    "dataloader_prefetch_factor": (1, 10_000),
    "ddp_bucket_cap_mb": (1, 1_000_000),
    "drop_threshold": (0, 1_000_000_000),
    "learning_rate_mapping": (0.0, 100.0),
    "max_example_num_per_dataset": (1, 1_000_000_000_000),
    "mrl_dims": (1, 1_000_000),
    "neftune_noise_alpha": (0.0, 1_000.0),
    "pad_to_multiple_of": (1, 8_192),
    "shuffle_ratio": (0.0, 1.0),
    "small_threshold": (0, 1_000_000_000),
    "torch_empty_cache_steps": (1, 1_000_000_000),
    # of losses
    **dict.fromkeys(("temperature", "student_temperature", "teacher_temperature"), (1e-4, 1_000.0)),
    **dict.fromkeys(("kl_temperature", "sigma", "eps", "pos_weight", "scale"), (_ABOVE_ZERO, 1_000_000.0)),
    **dict.fromkeys(("margin", "triplet_margin", "positive_margin", "negative_margin"), (0.0, 1_000.0)),
    **dict.fromkeys(("last_layer_weight", "prior_layers_weight", "kl_div_weight"), (0.0, 1_000_000.0)),
    **dict.fromkeys(("matryoshka_weights", "hardness_strength", "alpha"), (0.0, 1_000_000.0)),
    **dict.fromkeys(("matryoshka_dims", "k", "num_negatives", "projection_dim"), (1, 1_000_000)),
    "mini_batch_num_tokens": (1, 1_000_000_000),
    **dict.fromkeys(("n_dims_per_step", "n_layers_per_step", "mini_batch_size"), (-1, 1_000_000)),
}
# An enumeration of a library, whose values are what may be given.
_ENUMERATED = {
    "optim": ("transformers/training_args.py", "OptimizerNames"),
    "debug": ("transformers/debug_utils.py", "DebugOption"),
    "torch_compile_backend": ("accelerate/utils/dataclasses.py", "DynamoBackend"),
}
_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "dataloader_multiprocessing_context": ("fork", "spawn", "forkserver"),
    "include_num_input_tokens_seen": (True, False, "all", "non_padding", "no"),
    "kd_loss_type": ("kl_div", "m3_kd_loss"),
    "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
}
# Optimizers, by a part of their names, that are in a package of their own.
_OPTIMIZER_PACKAGES = {
    **dict.fromkeys(("bnb", "adamw_8bit", "ademamix", "lion_", "paged_"), "bitsandbytes"),
    **dict.fromkeys(("torch_4bit", "torch_8bit"), "torchao"),
    **{"galore": "galore_torch", "lomo": "lomo_optim", "grokadamw": "grokadamw", "schedule_free": "schedulefree"},
    **{"apollo": "apollo_torch", "stable_adamw": "optimi", "anyprecision": "torchdistx"},
    **{"_xla": "torch_xla", "_npu": "torch_npu"},
}
_SCHEDULERS = {
    "linear": "get_linear_schedule_with_warmup",
    "cosine": "get_cosine_schedule_with_warmup",
    "cosine_with_restarts": "get_cosine_with_hard_restarts_schedule_with_warmup",
    "cosine_with_min_lr": "get_cosine_with_min_lr_schedule_with_warmup",
    "polynomial": "get_polynomial_decay_schedule_with_warmup",
    "constant": "get_constant_schedule",
    "constant_with_warmup": "get_constant_schedule_with_warmup",
    "inverse_sqrt": "get_inverse_sqrt_schedule",
    "warmup_stable_decay": "get_wsd_schedule",
}
_SCHEDULERS_OWN = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}  # what the trainer gives


def check_arguments(kind: ModelKind, settings: TrainingSettings) -> str | None:
    """Why `settings.arguments` cannot be given to the engine's library; None if they can.

    A name that the installed version does not have, that another key decides, or a value that it does not take.
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
        if problem := _value_problem(name, value, known[name], settings.engine):
            return problem
    return _do_not_go_together(settings)


def check_loss_arguments(kind: ModelKind, loss: str, given: Mapping[str, Any]) -> str | None:
    """Why the values of a loss's arguments, whose names are right, cannot be given to it; None if they can."""
    types = _loss_arguments(kind).get(loss, {}) if given else {}
    for name, value in given.items():
        if name == "distance_metric" and types.get(name) is None:
            distances = ("cosine", "euclidean") if loss.startswith("Batch") else ("cosine", "euclidean", "manhattan")
            if value not in distances:
                return f"{name} is one of {', '.join(distances)}; found {value!r}"
        elif problem := _value_problem(name, value, types.get(name) or "Any", loss):
            return problem
    return None


def _value_problem(name: str, value: Any, annotation: str, owner: str) -> str | None:
    if not _fits(annotation, value):
        return f"{name} is {annotation} in the installed {owner}; found {value!r}"
    choices: Sequence[Any] = _CHOICES.get(name, ())
    if name in _ENUMERATED:
        choices = _enumerated(*_ENUMERATED[name])
    if choices and value is not None:
        for one in value if isinstance(value, list) else [value]:
            told = one.split() if name == "debug" and isinstance(one, str) else [one]
            if wrong := [part for part in told if part not in choices]:
                near = difflib.get_close_matches(str(wrong[0]), [str(choice) for choice in choices], n=1)
                hint = f" Did you mean '{near[0]}'?" if near else ""
                return f"{name}: found {wrong[0]!r}.{hint} Expected one of {', '.join(str(one) for one in choices)}"
    if name in _RANGES:
        low, high = _RANGES[name]
        if wrong := [number for number in _numbers_in(value) if not low <= number <= high]:
            shown = "above 0" if low == _ABOVE_ZERO else f"{low:g} or more"
            below = "below 1" if high == 1.0 - 1e-9 else f"at most {high:g}"
            return f"{name}: found {wrong[0]}, expected {shown} and {below}"
    return None


def _do_not_go_together(settings: TrainingSettings) -> str | None:
    """Why the arguments, each of which may be given, cannot be given beside one another or beside our keys."""
    given = settings.arguments
    workers = given.get("dataloader_num_workers", 0)
    for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
        if given.get(name) and not workers:
            return f"{name} needs dataloader_num_workers above 0"
    optimizer = str(given.get("optim", ""))
    for part, package in _OPTIMIZER_PACKAGES.items():
        if part in optimizer and importlib.util.find_spec(package) is None:
            return f"optim: {optimizer} is in the package {package}, which is not installed"
    if given.get("use_liger_kernel") and importlib.util.find_spec("liger_kernel") is None:
        return "use_liger_kernel: the package liger_kernel is not installed"
    if (text := given.get("optim_args")) is not None:
        for part in text.replace(" ", "").split(","):
            if part.count("=") != 1 or not all(part.split("=")):
                return "optim_args: expected name=value pairs with commas between them, such as 'momentum=0.9'"
    return _scheduler_problem(settings)


def _scheduler_problem(settings: TrainingSettings) -> str | None:
    given = settings.arguments.get("lr_scheduler_kwargs")
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            given = None
        if not isinstance(given, dict):
            return "lr_scheduler_kwargs: expected names and values, such as {num_cycles: 2}"
    allowed = _scheduler_arguments(settings.scheduler)
    for name, value in (given or {}).items():
        if name not in allowed:
            return (
                f"lr_scheduler_kwargs: the scheduler {settings.scheduler} takes no {name}. "
                f"Allowed: {', '.join(allowed) or 'none'}"
            )
        if not _fits(allowed[name] or "Any", value):
            return f"lr_scheduler_kwargs: {name} is {allowed[name]} in transformers; found {value!r}"
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
    """Field -> annotation, of a dataclass in an installed package."""
    for node in _parsed(file).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            fields = [
                item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            ]
            return {
                field.target.id: ast.unparse(field.annotation) for field in fields if isinstance(field.target, ast.Name)
            }
    raise _unknown_version(file, name)


@functools.cache
def _enumerated(file: str, name: str) -> tuple[str, ...]:
    """The values of an enumeration of texts in an installed package, as they are given."""
    for node in _parsed(file).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            assigned = [item.value for item in node.body if isinstance(item, ast.Assign)]
            values = [one.value for one in assigned if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            return tuple(value.lower() for value in values if value != "NO")
    raise _unknown_version(file, name)


@functools.cache
def _scheduler_arguments(scheduler: str) -> dict[str, str | None]:
    """Argument -> annotation, of a scheduler's own arguments."""
    file, name = "transformers/optimization.py", _SCHEDULERS[scheduler]
    for node in _parsed(file).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return {name: told for name, told in _arguments_of(node).items() if name not in _SCHEDULERS_OWN}
    raise _unknown_version(file, name)


@functools.cache
def _loss_arguments(kind: ModelKind) -> dict[str, dict[str, str | None]]:
    """Loss -> argument -> annotation, of one kind of model."""
    room = "sentence_transformer" if kind == "embedder" else "cross_encoder"
    folder = _folder_of("sentence_transformers") / "sentence_transformers" / room / "losses"
    found = {}
    for file in sorted(folder.glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            for item in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(node, ast.ClassDef) and isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    found[node.name] = _arguments_of(item)
    return found


def _arguments_of(function: ast.FunctionDef) -> dict[str, str | None]:
    """Argument -> annotation, or else the type of its default; None where neither tells."""
    told, arguments = function.args, [*function.args.args, *function.args.kwonlyargs]
    defaults = [*([None] * (len(told.args) - len(told.defaults))), *told.defaults, *told.kw_defaults]
    return {
        one.arg: ast.unparse(one.annotation) if one.annotation else _type_of(default)
        for one, default in zip(arguments, defaults, strict=True)
    }


def _type_of(default: ast.expr | None) -> str | None:
    if not isinstance(default, ast.Constant) or default.value is None:
        return None
    return "float" if type(default.value) is int else type(default.value).__name__


@functools.cache
def _parsed(file: str) -> ast.Module:
    return ast.parse((_folder_of(file.split("/", 1)[0]) / file).read_text(encoding="utf-8"))


def _folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)  # finds the package without importing it
    if spec is None or spec.origin is None:
        raise ConfigurationError(f"{package} is not installed, so its training arguments are not known")
    return Path(spec.origin).parent.parent


def _unknown_version(file: str, name: str) -> ConfigurationError:
    package = file.split("/", 1)[0]
    return ConfigurationError(f"{file} has no {name}: this version of {package} is not one we know")


_TYPES = {
    **{"str": str, "int": int, "float": float, "bool": bool, "dict": dict, "list": list, "tuple": tuple},
    **{"Optional": Optional, "Union": Union, "List": list, "Dict": dict, "Sequence": Sequence, "Literal": Literal},
    **{"Any": Any, "Callable": Callable, "Tensor": float, "OptimizerNames": str, "DebugOption": str},
}


@functools.cache
def _checked(annotation: str) -> TypeAdapter[Any]:
    """A check of values by a library's annotation; of anything where it names what no YAML can hold."""
    try:
        tree = ast.parse(annotation.strip("'\""), mode="eval")
        if {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} <= set(_TYPES):
            return TypeAdapter(_plain_type(tree.body))
    except (SyntaxError, ValueError):
        pass
    return TypeAdapter(Any)


def _plain_type(node: ast.expr) -> Any:
    """The type that an annotation means. Raises ValueError for what is none of plain types."""
    match node:
        case ast.Constant(value=None):
            return None
        case ast.Constant(value=str(quoted)):
            return _plain_type(ast.parse(quoted, mode="eval").body)
        case ast.Constant(value=types.EllipsisType()):
            return ...
        case ast.Name(id=name) if name in _TYPES:
            return _TYPES[name]
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return Union[_plain_type(left), _plain_type(right)]  # noqa: UP007  (None has no |)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=chosen):
            return Literal[ast.literal_eval(chosen)]
        case ast.Subscript(value=origin, slice=ast.Tuple(elts=several)):
            return _plain_type(origin)[tuple(map(_plain_type, several))]
        case ast.Subscript(value=origin, slice=one):
            return _plain_type(origin)[_plain_type(one)]
        case ast.List(elts=inner):
            return [_plain_type(one) for one in inner]
    raise ValueError(ast.unparse(node))


def _fits(annotation: str, value: Any) -> bool:
    try:
        # As JSON, where a list may be a tuple and a whole number a float, but true is no number and "1" no 1.
        _checked(annotation).validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError, ValueError):
        return False
    return True


def _numbers_in(value: Any) -> list[float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in _numbers_in(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []
