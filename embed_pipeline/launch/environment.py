"""The environment of a job: what it needs to find its files, its network and its GPUs, and nothing that steers it.

What a training computes stands in its job file. The libraries under it also listen to some hundred variables, which a
shell, a container or a cluster may have set for another program: ACCELERATE_MIXED_PRECISION changes the weights,
PET_NNODES has torchrun wait for machines that nobody starts. So a job is given the variables on a list, those that
`launch.environment` names, and what its launcher sets; the rest stays behind, and what would have steered it is told.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping

logger = logging.getLogger(__name__)

# The names in `launch.environment`, for whoever starts a part of the job on another machine. There a person may set it
# as well, for what `embed-pipeline join` takes part in.
NAMED_VARIABLE = "EMBED_PIPELINE_JOB_VARIABLES"

# A name that ends with * stands for all that begin so.
PASSED_ON = (
    # The user and the machine.
    *("PATH", "HOME", "USER", "LOGNAME", "USERNAME", "SHELL", "HOSTNAME", "PWD", "TZ", "LANG", "LANGUAGE", "LC_*"),
    *("TMPDIR", "TMP", "TEMP", "XDG_*", "TERM", "COLUMNS", "NO_COLOR", "KRB5CCNAME", "KRB5_CONFIG"),
    # Python, and where it finds modules and shared libraries. Not what it runs at its start, nor PYTHONOPTIMIZE, which
    # takes assertions away.
    *("VIRTUAL_ENV", "CONDA_*", "PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "PYTHONNOUSERSITE", "PYTHONSAFEPATH"),
    *("PYTHONUNBUFFERED", "PYTHONIOENCODING", "PYTHONUTF8", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"),
    *("PYTHONFAULTHANDLER", "LD_LIBRARY_PATH", "LD_PRELOAD", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH"),
    # A compiler, which triton calls.
    *("CC", "CXX", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "TRITON_CACHE_DIR"),
    # Memory allocators: how much they keep, not what is computed.
    *("MALLOC_*", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"),
    # Threads beside those of the rank, which `take_place` decides.
    *("OMP_NUM_THREADS", "OMP_STACKSIZE", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"),
    *("RAYON_NUM_THREADS", "KMP_DUPLICATE_LIB_OK", "TOKENIZERS_PARALLELISM"),
    # Which GPUs there are, and their drivers.
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_HOME", "CUDA_PATH", "CUDA_CACHE_*", "CUDA_MODULE_LOADING"),
    *("CUDA_LAUNCH_BLOCKING", "CUDA_MPS_*", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"),
    *("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCM_PATH", "ROCM_HOME"),
    *("HSA_OVERRIDE_GFX_VERSION", "ZE_AFFINITY_MASK", "PYTORCH_ENABLE_MPS_FALLBACK", "PYTORCH_MPS_*"),
    # The network between processes, and towards the world.
    *("NCCL_*", "RCCL_*", "GLOO_*", "TORCH_NCCL_*", "TORCH_GLOO_*", "UCX_*", "FI_*", "RDMAV_*", "IBV_*"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "FTP_PROXY"),
    *("http_proxy", "https_proxy", "no_proxy", "all_proxy", "ftp_proxy"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    # Models, stores, MLflow, and who may read them.
    *("HF_*", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_CACHE", "SENTENCE_TRANSFORMERS_HOME", "TORCH_HOME"),
    *("TRANSFORMERS_CACHE", "TRANSFORMERS_OFFLINE", "TRANSFORMERS_VERBOSITY", "TRANSFORMERS_NO_ADVISORY_WARNINGS"),
    *("AWS_*", "AZURE_*", "GOOGLE_*", "CLOUDSDK_*", "MLFLOW_*"),
    # What a debugging person sets.
    *("TORCH_CPP_LOG_LEVEL", "TORCH_DISTRIBUTED_DEBUG", "TORCH_SHOW_CPP_STACKTRACES", "TORCH_LOGS", "LOGLEVEL"),
    # Environment modules, which `launch.setup` calls: `module` is a function that bash takes from here.
    *("MODULE*", "LMOD_*", "LOADEDMODULES", "_LMFILES_", "BASH_FUNC_*", "BASH_ENV"),
    # Clusters: how they are reached, and defaults of sbatch that a site sets.
    *("SLURM_CONF", "SLURM_CONF_SERVER", "SBATCH_*", "RAY_*"),
    # Ours.
    *("EMBED_PIPELINE_STORE", "EMBED_PIPELINE_DEFS", "EMBED_PIPELINE_SMOKE_TEST", "DAGSTER_HOME"),
)
# What torch sets by itself in the process of a step: nobody is told of it.
_OF_TORCH = ("KMP_INIT_AT_FORK", "TORCHINDUCTOR_CACHE_DIR")
# Within those: another program's run, which this job is no part of.
_NOT_PASSED_ON = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME", "SBATCH_EXPORT")
# What a launcher sets, and no surrounding program may.
_LAUNCHERS_OWN = ("TORCHELASTIC_ERROR_FILE", "DAGSTER_PIPES_*", "EMBED_PIPELINE_*")

# What steers the libraries: numerics, number of processes, code that is run. Not complete, nor need it be: what is not
# passed on steers nothing. It decides what a person is told, and what `launch.environment` may not name.
STEERING = (
    *("ACCELERATE_*", "PET_*", "FSDP_*", "DEEPSPEED_*", "MEGATRON_*", "PARALLELISM_CONFIG_*", "SM_*"),
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMPI_*", "PMI_*", "PMIX_*", "MV2_*"),
    *("TORCH*", "PYTORCH_*", "ATEN_*", "AOT*", "XLA_*", "PJRT_*", "USE_TORCH_XLA", "USE_TF", "USE_LIBUV", "TRITON_*"),
    *("TRANSFORMERS_*", "USE_HUB_KERNELS", "TRUST_REMOTE_CODE", "FLASH_ATTENTION_*", "HCCL_*"),
    *("MKL_*", "DNNL_*", "ONEDNN_*", "OMP_*", "KMP_*", "GOMP_*", "OPENBLAS_*"),
    *("NVIDIA_TF32_OVERRIDE", "CUDA_FORCE_*", "CUDA_DISABLE_*", "CUBLAS_*", "CUBLASLT_*", "CUDNN_*", "LD_*", "DYLD_*"),
    *("PYTHONSTARTUP", "PYTHONOPTIMIZE", "PYTHONINSPECT", "PYTHONHASHSEED", "PYTHONDEVMODE", "PYTHONMALLOC"),
    *("PYTHONBREAKPOINT", "PYTHONINTMAXSTRDIGITS", "PYTHON_GIL", "PYTHON_JIT", "PYTHON_CPU_COUNT"),
)
# Of those, what changes the numbers of the process that it stands in, whatever is asked of torch; and what has torch
# unpickle anything where a library does not say `weights_only`.
_OVERRULING = (
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",
    *("ATEN_CPU_CAPABILITY", "DNNL_*", "ONEDNN_*", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE"),
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "CUDNN_*"),
)


def job_environment(own: Mapping[str, str]) -> dict[str, str]:
    """The environment in which a job is started here: what is passed on of this process's, and over it `own`.

    `own` is what the launcher sets, under names of EMBED_PIPELINE_* or of what is passed on; it names what
    `launch.environment` adds under NAMED_VARIABLE. Tells what would have steered the job, by its name alone: a value
    may be a secret.
    """
    named = _named({**os.environ, **own})
    kept = {name: value for name, value in os.environ.items() if _is_passed_on(name, named)}
    _tell(name for name in os.environ if name not in kept and name not in own)
    return {**kept, **own, **({NAMED_VARIABLE: ",".join(sorted(named))} if named else {})}


def keep_to_job_environment() -> None:
    """Take from this process's environment what a cluster added to that of its job: torchrun's agent begins so."""
    named = _named(os.environ)
    others = [name for name in os.environ if not _is_passed_on(name, named) and not _one_of(name, _LAUNCHERS_OWN)]
    _tell(others)
    for name in others:
        del os.environ[name]


def compute_as_asked() -> None:
    """Take from this process's environment what overrules its arithmetic; it is to compute what a job would."""
    others = [name for name in os.environ if _one_of(name, _OVERRULING)]
    _tell(others)
    for name in others:
        del os.environ[name]


def problem_with(names: Iterable[str]) -> str | None:
    """Why `launch.environment` may not name these, if it may not."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            return f"expected names of variables, such as MY_DATA_FOLDER; found {name!r}"
        if _one_of(name, STEERING) and not _one_of(name, PASSED_ON):
            return (
                f"{name} steers the libraries, so a job could compute something else under the same version. Say it in "
                "the YAML (precision, nproc_per_node, nnodes, arguments); a variable that a model's own code reads "
                "needs another name"
            )
        if _one_of(name, (*_NOT_PASSED_ON, *_LAUNCHERS_OWN)):
            return f"{name} is set by the pipeline itself. Leave it out"
    return None


def _named(environment: Mapping[str, str]) -> frozenset[str]:
    names = frozenset(environment.get(NAMED_VARIABLE, "").split(","))
    return frozenset() if problem_with(names) else names


def _is_passed_on(name: str, named: frozenset[str]) -> bool:
    return name in named or (_one_of(name, PASSED_ON) and not _one_of(name, _NOT_PASSED_ON))


def _one_of(name: str, patterns: Iterable[str]) -> bool:
    return any(name.startswith(p[:-1]) if p.endswith("*") else name == p for p in patterns)


def _tell(left_out: Iterable[str]) -> None:
    steering: list[str] = []
    others: list[str] = []
    for name in sorted(set(left_out) - set(_OF_TORCH)):
        # Images of containers say so what is installed in them.
        is_label = name.endswith("_VERSION")
        (steering if _one_of(name, STEERING) and not is_label else others).append(name)
    if steering:
        logger.warning(
            "ignored from the environment, because it could change what is computed: %s. Set it in the YAML instead",
            ", ".join(steering),
        )
    if others:
        logger.debug("not passed on to the job: %s", ", ".join(others))
