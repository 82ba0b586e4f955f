"""A pickle runs whatever code it names. This package reads none, and every call that could is on a list here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import embed_pipeline

PACKAGE = Path(embed_pipeline.__file__).parent
# Modules that unpickle, or that run what they are given.
NEVER_IMPORTED = {
    "pickle",
    "cPickle",
    "_pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "shelve",
    "marshal",
    "runpy",
    "jsonpickle",
}
# Calls by the last parts of their names, and what each must be told: an argument with that very value.
CALLS = {
    ("torch", "load"): ("weights_only", True),
    ("np", "load"): ("allow_pickle", False),
    ("np", "fromfile"): None,
    ("np", "lib", "npyio"): None,
    ("pd", "read_pickle"): None,
    ("pickle", "load"): None,
    ("pickle", "loads"): None,
    ("yaml", "load"): None,
    ("yaml", "unsafe_load"): None,
    ("yaml", "full_load"): None,
    ("load_dataset",): None,
    ("load_from_disk",): None,
    ("torch", "hub", "load"): None,
    ("torch", "jit", "load"): None,
    ("torch", "package"): None,
    ("eval",): None,
    ("exec",): None,
    ("compile",): None,
    ("__import__",): None,
}
# What runs code that comes with a model, and why it may.
ALLOWED = {
    # The registry's files are compared with what was registered before anything of them is loaded.
    ("tracking/registry.py", "mlflow.pyfunc.load_model"),
    ("tracking/registry.py", "mlflow.sentence_transformers.load_model"),
}
LOADS_MODELS = ("load_model",)  # mlflow's; safetensors' own is a function of that name without a module before it


@dataclass(frozen=True)
class Found:
    where: str
    line: int
    name: str
    problem: str


def dotted(node: ast.expr) -> tuple[str, ...]:
    """`torch.hub.load` -> its parts; () for anything that is no plain name."""
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
        return (*before, node.attr)
    return ()


def look(source: str, where: str) -> Iterator[Found]:
    """What is not allowed in a file of Python."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            for name in names:
                if name.partition(".")[0] in NEVER_IMPORTED:
                    yield Found(where, node.lineno, name, "imported")
            if isinstance(node, ast.ImportFrom) and node.module in ("torch", "numpy", "yaml", "mlflow.pyfunc"):
                for alias in node.names:
                    if alias.name in ("load", "load_model"):
                        yield Found(where, node.lineno, alias.name, "call it by its module, so that it is seen here")
        if not isinstance(node, ast.Call) or not (name := dotted(node.func)):
            continue
        called = ".".join(name)
        if name[0] == "numpy":
            name = ("np", *name[1:])
        if name[-1] in LOADS_MODELS and len(name) > 1 and (where, called) not in ALLOWED:
            yield Found(where, node.lineno, called, "loads a model with its code")
        told = {keyword.arg: keyword.value for keyword in node.keywords}
        for call, needed in CALLS.items():
            if name[: len(call)] != call and name[-len(call) :] != call:
                continue
            if len(call) == 1 and len(name) > 1 and call[0] in ("eval", "exec", "compile"):
                continue  # model.eval(), re.compile()
            if needed is None:
                yield Found(where, node.lineno, called, "never")
            elif not (isinstance(value := told.get(needed[0]), ast.Constant) and value.value is needed[1]):
                yield Found(where, node.lineno, called, f"without {needed[0]}={needed[1]}")
        trusted = told.get("trust_remote_code")
        if isinstance(trusted, ast.Constant) and trusted.value:
            yield Found(where, node.lineno, called, "trusts code without being asked to")


def test_the_package_unpickles_nothing() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 100
    found = [one for path in files for one in look(path.read_text(), path.relative_to(PACKAGE).as_posix())]
    assert found == []


def test_every_line_of_the_list_is_still_needed() -> None:
    for where, called in ALLOWED:
        assert called in (PACKAGE / where).read_text()


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=asked)",
        "numpy.load(path)",
        "np.load(path, allow_pickle=True)",
        "from torch import load",
        "datasets.load_dataset('csv', trust_remote_code=True)",
        "load_dataset('x')",
        "pd.read_pickle(path)",
        "yaml.load(text, Loader)",
        "mlflow.pyfunc.load_model(uri)",
        "SentenceTransformer(path, trust_remote_code=True)",
        "eval(text)",
        "torch.hub.load('repository', 'model')",
    ],
)
def test_what_is_forbidden_is_seen(source: str) -> None:
    assert list(look(source, "some/file.py"))


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, map_location='cpu', weights_only=True)",
        "np.load(path, mmap_mode='r', allow_pickle=False)",
        "model.eval(); re.compile('x')",
        "load_model(model, path)",
        "SentenceTransformer(path, trust_remote_code=asked)",
        "yaml.safe_load(text)",
    ],
)
def test_what_is_allowed_is_not_in_the_way(source: str) -> None:
    assert not list(look(source, "some/file.py"))
