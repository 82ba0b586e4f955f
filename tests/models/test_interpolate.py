"""Weights between two models', whatever files they stand in."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from embed_pipeline.errors import ModelError
from embed_pipeline.models.embedder import Embedder, load_sentence_transformer
from embed_pipeline.models.interpolate import interpolate, save_as_trained
from embed_pipeline.settings import EncodingSettings

TEXTS = ["where is the river", "a garden of silver stones", "nothing"]


def write(folder: Path, **files: Mapping[str, torch.Tensor]) -> Path:
    """`write(folder, model={...}, extra__model={...})`: one safetensors file each; `__` is a folder."""
    for name, tensors in files.items():
        path = folder / f"{name.replace('__', '/')}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"of": folder.name}))
    return folder


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


@settings(max_examples=50, deadline=None)
@given(
    coefficient=st.floats(0, 1),
    of_base=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    of_fine_tuned=st.sampled_from([torch.float32, torch.bfloat16]),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
)
def test_every_tensor_is_the_weighted_sum_in_float32(
    tmp_path_factory: pytest.TempPathFactory,
    coefficient: float,
    of_base: torch.dtype,
    of_fine_tuned: torch.dtype,
    shape: list[int],
) -> None:
    folder = tmp_path_factory.mktemp("sum")
    base, fine_tuned = numbers(1, *shape, dtype=of_base), numbers(2, *shape, dtype=of_fine_tuned)
    write(folder / "base", model={"w": base, "ids": torch.arange(3)})
    write(folder / "fine_tuned", model={"w": fine_tuned, "ids": torch.arange(3) + 7})
    interpolate(folder / "base", folder / "fine_tuned", coefficient, folder / "out")
    merged = load_file(folder / "out" / "model.safetensors")
    expected = (1 - coefficient) * base.float() + coefficient * fine_tuned.float()
    assert merged["w"].dtype == of_fine_tuned
    assert torch.equal(merged["w"], expected.to(of_fine_tuned))
    assert merged["ids"].tolist() == [7, 8, 9]  # no weights: the fine-tuned model's
    assert json.loads((folder / "out" / "config.json").read_text()) == {"of": "fine_tuned"}


def test_one_gives_the_fine_tuned_files_and_zero_the_bases_numbers(tmp_path: Path) -> None:
    tensors = {"w": torch.tensor([-0.0, 1e-8, 3.0]), "b": numbers(3, 5)}
    write(tmp_path / "base", model=tensors)
    # Not even what is infinite in the other model shows.
    write(tmp_path / "fine_tuned", model={"w": torch.tensor([1.0, torch.inf, 2.0]), "b": numbers(4, 5)})
    for coefficient in (0.0, 1.0):
        interpolate(tmp_path / "base", tmp_path / "fine_tuned", coefficient, tmp_path / str(coefficient))
    merged, of_base = load_file(tmp_path / "0.0" / "model.safetensors"), load_file(tmp_path / "base/model.safetensors")
    assert all(merged[name].numpy().tobytes() == of_base[name].numpy().tobytes() for name in of_base)
    digests = [
        hashlib.sha256((tmp_path / folder / "model.safetensors").read_bytes()).digest()
        for folder in ("1.0", "fine_tuned")
    ]
    assert digests[0] == digests[1]


def test_shards_and_modules_of_their_own_are_merged_too(tmp_path: Path) -> None:
    a, b, dense = numbers(1, 4), numbers(2, 4), numbers(3, 2)
    write(tmp_path / "base", model={"a": a, "b": b}, **{"2_Dense__model": {"a": dense}})
    write(
        tmp_path / "fine_tuned",
        **{
            "model-00001-of-00002": {"a": a + 1},
            "model-00002-of-00002": {"b": b + 1},
            "2_Dense__model": {"a": dense + 1},
        },
    )
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "fine_tuned" / "model.safetensors.index.json").write_text(json.dumps(index))
    interpolate(tmp_path / "base", tmp_path / "fine_tuned", 0.25, tmp_path / "out")
    assert torch.allclose(load_file(tmp_path / "out" / "model-00001-of-00002.safetensors")["a"], a + 0.25)
    assert torch.allclose(load_file(tmp_path / "out" / "model-00002-of-00002.safetensors")["b"], b + 0.25)
    assert torch.allclose(load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")["a"], dense + 0.25)
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text()) == index


@pytest.mark.parametrize(
    ("fine_tuned", "said"),
    [
        ({"a": numbers(1, 4), "b": numbers(2, 5)}, r"the tensor 'b' has the shape \[4\] in .*base, but \[5\] in"),
        ({"a": numbers(1, 4)}, "base has the tensor 'b', .*fine_tuned has not"),
        ({"a": numbers(1, 4), "b": numbers(2, 4), "c": numbers(3, 4)}, "fine_tuned has the tensor 'c', .*base has not"),
    ],
)
def test_models_of_another_form_are_refused_before_anything_is_written(
    tmp_path: Path, fine_tuned: dict[str, torch.Tensor], said: str
) -> None:
    write(tmp_path / "base", model={"a": numbers(1, 4), "b": numbers(2, 4)})
    write(tmp_path / "fine_tuned", model=fine_tuned)
    with pytest.raises(ModelError, match=f"{said}.* Only a model and what was fine-tuned from it can be merged"):
        interpolate(tmp_path / "base", tmp_path / "fine_tuned", 0.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "fine_tuned", model={"a": numbers(1, 4)})
    (tmp_path / "base").mkdir()
    with pytest.raises(ModelError, match=r"no weights to interpolate in .*base: expected \*\.safetensors"):
        interpolate(tmp_path / "base", tmp_path / "fine_tuned", 0.5, tmp_path / "out")


# --------------------------------------------------------------------------------------------- real models


@pytest.fixture(scope="module")
def fine_tuned(tiny_bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT with other weights, saved as a training saves it, with a prompt of its own."""
    model = load_sentence_transformer(tiny_bert_folder, EncodingSettings(query_prompt="ask: "), device="cpu")
    torch.manual_seed(1)
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.05 * torch.randn_like(weights)
    folder = tmp_path_factory.mktemp("fine_tuned") / "model"
    model.save_pretrained(str(folder), create_model_card=False)
    return folder


def embeddings(folder: Path, encoding: EncodingSettings | None = None) -> np.ndarray:
    embedder = Embedder(folder, encoding, precision="float32", device="cpu")
    return np.concatenate([embedder.encode_queries(TEXTS), embedder.encode_passages(TEXTS)])


def test_the_ends_encode_as_base_and_fine_tuned_and_the_middle_as_neither(
    tiny_bert_folder: Path, fine_tuned: Path, tmp_path: Path
) -> None:
    encoding = EncodingSettings(query_prompt="ask: ")
    save_as_trained(tiny_bert_folder, encoding, tmp_path / "base")
    for coefficient in (0.0, 0.5, 1.0):
        interpolate(tmp_path / "base", fine_tuned, coefficient, tmp_path / str(coefficient))
    at = {name: embeddings(tmp_path / name) for name in ("0.0", "0.5", "1.0")}
    np.testing.assert_allclose(at["0.0"], embeddings(tiny_bert_folder, encoding), atol=1e-6)
    np.testing.assert_array_equal(at["1.0"], embeddings(fine_tuned))
    to_base, to_fine_tuned, apart = (
        np.linalg.norm(left - right)
        for left, right in ((at["0.5"], at["0.0"]), (at["0.5"], at["1.0"]), (at["0.0"], at["1.0"]))
    )
    assert 0 < to_base < apart
    assert 0 < to_fine_tuned < apart


@pytest.mark.parametrize(
    "form", ["torch's own format", "a head and a prefix", "half precision", "no modules", "shards"]
)
def test_a_base_of_any_form_can_be_merged(tiny_bert_folder: Path, fine_tuned: Path, tmp_path: Path, form: str) -> None:
    base = tmp_path / "delivered"
    shutil.copytree(tiny_bert_folder, base)
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    if form == "torch's own format":
        torch.save(weights, base / "pytorch_model.bin")
    elif form == "a head and a prefix":
        prefixed = {f"bert.{name}": tensor for name, tensor in weights.items()}
        head = {"cls.predictions.bias": torch.zeros(10)}
        save_file({**prefixed, **head}, base / "model.safetensors", metadata={"format": "pt"})
    elif form == "half precision":
        halves = {name: tensor.half() for name, tensor in weights.items()}
        save_file(halves, base / "model.safetensors", metadata={"format": "pt"})
    elif form == "shards":
        names = sorted(weights)
        files = {name: f"model-0000{1 + (name > names[20])}-of-00002.safetensors" for name in names}
        for file in set(files.values()):
            of_file = {name: weights[name] for name in names if files[name] == file}
            save_file(of_file, base / file, metadata={"format": "pt"})
        (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    else:
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        (base / "modules.json").unlink()  # a plain transformers folder: mean pooling is the library's default
    save_as_trained(base, EncodingSettings(query_prompt="ask: "), tmp_path / "base")
    interpolate(tmp_path / "base", fine_tuned, 0.5, tmp_path / "merged")
    merged, other = load_file(tmp_path / "merged" / "model.safetensors"), load_file(fine_tuned / "model.safetensors")
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, (weights[name] + other[name]) / 2, atol=1e-3, rtol=1e-3)
    assert np.isfinite(embeddings(tmp_path / "merged")).all()
