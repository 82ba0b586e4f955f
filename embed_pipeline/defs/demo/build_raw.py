"""The demo's raw data: the reference documentation of libraries that every install of this project has on disk.

    python build_raw.py OUTPUT_FOLDER

writes `docstrings.parquet`, a row a public function, class or method: `question` (the docstring's summary), `passage`
(what it says below, without the signature), `document` (the class or module it belongs to), `library`, `name`. Texts
that a library repeats over classes stand as often as they are repeated. The same library versions give the same bytes.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq

FILE = "docstrings.parquet"
LIBRARIES = ("pandas", "numpy", "scipy", "sklearn", "networkx", "torch")
# Parts of a library that need what may not be installed, or that hold no documentation of its public functions.
SKIPPED = re.compile(
    r"(^|\.)_|\.(tests?|testing|conftest|core|compat|externals|setup|f2py|distutils|ma\.extras|typing|plotting|drawing"
    r"|onnx|cuda|xpu|mps|mtia|fx|jit|distributed|testing|utils|ao|backends|contrib|package|quantization|profiler"
    r"|monitor|export|compiler|multiprocessing|hub|version|overrides|experimental|cython_special)(\.|$)"
)
MODULES_DEEP = 4
SUMMARY_WORDS = 3
BODY_WORDS = 8
PASSAGE_CHARACTERS = 350

DESCRIBED = (property, classmethod, staticmethod)

_ROLE = re.compile(r":[\w:+-]+:`~?!?([^`<]*?)(?:\s*<[^`>]*>)?`")
_LITERAL = re.compile(r"``([^`]*)``|`([^`]*)`_{0,2}")
_DIRECTIVE = re.compile(r"^\s*\.\. [\w:-]+::.*$|^\s*\.\. _.*$|^\s*[-=~^*#]{3,}\s*$", re.MULTILINE)
_MACHINE = re.compile(r"0x[0-9a-f]{6,}|/(?:home|root|usr|tmp|opt|Users)/\S*")


def main(output: Path) -> None:
    rows = sorted(row for library in LIBRARIES for row in documented(library))
    columns = ("library", "name", "document", "question", "passage")
    table = pa.table({column: [row[index] for row in rows] for index, column in enumerate(columns)})
    output.mkdir(parents=True, exist_ok=True)
    # Whole or not at all, and under a name that no pattern finds before: another run may be reading or writing here.
    unfinished = output / f".{FILE}.{os.getpid()}.unfinished"
    pq.write_table(table, unfinished, compression="zstd")
    unfinished.replace(output / FILE)
    print(f"{table.num_rows} documented functions, classes and methods -> {FILE}")


def documented(library: str) -> Iterator[tuple[str, str, str, str, str]]:
    """(library, name, document, question, passage) of everything public that has a summary and a text below it."""
    things = public_things(library)
    classes = [thing for _, _, thing in things if inspect.isclass(thing)]
    for document, name, thing in things:
        told = summary_and_body(docstring(thing))
        if told is not None:
            yield library, name, document, *told
        if inspect.isclass(thing):
            for method, member in own_methods(thing, classes):
                told = summary_and_body(docstring(member))
                if told is not None:
                    yield library, f"{name}.{method}", document, *told


def public_modules(library: str) -> list[ModuleType]:
    """The library and its public submodules, by name; those that cannot be imported here are left out."""
    names = [library]
    for name in names:
        module = _imported(name)
        if module is None or name.count(".") >= MODULES_DEEP or not hasattr(module, "__path__"):
            continue
        children = sorted(f"{name}.{found.name}" for found in pkgutil.iter_modules(module.__path__))
        names.extend(child for child in children if not SKIPPED.search(child))
    return [module for name in names if (module := _imported(name)) is not None]


def _imported(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except Exception:  # whatever an optional part raises where what it needs is missing
        return None


def public_things(library: str) -> list[tuple[str, str, object]]:
    """(document, qualified name, object) of functions and classes, each under the shortest name it is public by."""
    found: dict[int, tuple[str, str, object]] = {}
    for module in public_modules(library):
        listed = getattr(module, "__all__", None)
        for name in sorted(map(str, listed if listed is not None else vars(module))):
            thing = vars(module).get(name)
            if not name.startswith("_") and _belongs(thing, library, module, listed is not None):
                qualified = f"{module.__name__}.{name}"
                document = qualified if inspect.isclass(thing) else _home(thing, module)
                found.setdefault(id(thing), (document, qualified, thing))
    return list(found.values())


def own_methods(cls: type, public: list[type]) -> Iterator[tuple[str, object]]:
    """Public methods and properties, but for those that a base class documents under its own name.

    What pandas' DataFrame and Series take from their private common base stands under both.
    """
    for method in sorted(dir(cls)):
        owner = next((base for base in cls.__mro__ if method in vars(base)), None)
        if method.startswith("_") or owner is None or (owner is not cls and owner in public):
            continue
        member = vars(owner)[method]
        if owner.__module__ != "builtins" and (callable(member) or isinstance(member, DESCRIBED)):
            yield method, member


def _belongs(thing: object, library: str, module: ModuleType, listed: bool) -> bool:
    if isinstance(thing, ModuleType) or not callable(thing):
        return False
    home = _home(thing, module)
    return home.split(".")[0] == library and (listed or home == module.__name__ or module.__name__ == library)


def _home(thing: object, module: ModuleType) -> str:
    """The module that defines it: finer than the one it is public in."""
    return str(getattr(thing, "__module__", None) or module.__name__)


def docstring(thing: object) -> str:
    if isinstance(thing, (classmethod, staticmethod)):
        thing = thing.__func__
    text = getattr(thing, "__doc__", None)
    return inspect.cleandoc(text) if isinstance(text, str) else ""


def summary_and_body(text: str) -> tuple[str, str] | None:
    """First paragraph in one line, and the rest cut at a word; None where either says too little."""
    paragraphs = re.split(r"\n\s*\n", text.strip())
    if paragraphs and re.match(r"[\w.]+\(.*\)", paragraphs[0], re.DOTALL):
        signature, _, rest = paragraphs[0].partition("\n")
        # numpy and torch write the signature above the summary, in a paragraph or a line of its own
        paragraphs = [rest, *paragraphs[1:]] if rest and ")" in signature else paragraphs[1:]
    if len(paragraphs) < 2:
        return None
    question = plain(paragraphs[0])
    body = plain("\n".join(paragraphs[1:]))
    if len(question.split()) < SUMMARY_WORDS or len(body.split()) < BODY_WORDS or len(question) > PASSAGE_CHARACTERS:
        return None
    return question, cut(body, PASSAGE_CHARACTERS)


def plain(text: str) -> str:
    """reStructuredText as a person reads it, in one line."""
    text = _DIRECTIVE.sub(" ", text)
    text = _ROLE.sub(lambda found: found[1].rsplit(".", 1)[-1] if "." in found[1] else found[1], text)
    text = _LITERAL.sub(lambda found: found[1] or found[2] or "", text)
    text = _MACHINE.sub(" ", text).replace("**", "").replace("::", ":").replace("\\ ", "")
    return " ".join(text.split())


def cut(text: str, characters: int) -> str:
    if len(text) <= characters:
        return text
    return text[: characters + 1].rsplit(" ", 1)[0]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if len(sys.argv) != 2:
        sys.exit("usage: python build_raw.py OUTPUT_FOLDER")
    main(Path(sys.argv[1]))
