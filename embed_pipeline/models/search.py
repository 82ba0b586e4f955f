"""Exact search: every query against every passage, with an answer that does not depend on how it was computed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from embed_pipeline.errors import ModelError
from embed_pipeline.models.precision import default_device

# Candidates kept beyond the k-th: those whose float32 product is so near to the k-th that rounding may swap them.
_SPARE = 32
# Rounding of a float32 product of two unit vectors; measured below 1e-6 up to 4,096 dimensions.
_ROUNDING = 1e-5
_PAIRS_PER_STEP = 32_768
# Candidates of a group of queries, which stay on the device until the group is done: 100 MB of values and row numbers.
_CANDIDATES_PER_GROUP = 8_388_608
_ROWS_PER_LOOK = 65_536
_QUERIES_PER_MERGE = 8_192
_SHARE_FILES = ("indices-{}.npy", "scores-{}.npy")


def search(
    queries: np.ndarray,
    passages: np.ndarray,
    top_k: int,
    *,
    queries_per_step: int = 512,
    passages_per_step: int = 65_536,
    device: str | None = None,
    first_passage: int = 0,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The `top_k` passages with the highest dot product for each query.

    queries (n, d) and passages (m, d), both float32 with unit rows -> indices (n, k) int64 and scores (n, k) float32,
    best first, where k = min(top_k, m). Equal scores are ordered by passage index, at the k-th place as well. Where
    `passages` are a share of more, `first_passage` is the number of its first row, and indices count from there.

    Candidates come from blocked float32 products, whose last bits depend on the shape of a block; their scores are
    then computed again one pair at a time in float64 (`pair_scores`), so neither the order nor the scores depend on
    the block sizes, on the other queries or on the machine. Memory beyond the inputs, which may be memory-mapped, and
    the results: one block of products (128 MB by default), and 8 million candidates with their order (300 MB).

    Raises ModelError when an embedding is not finite.
    """
    _check_finite(queries, "queries")
    _check_finite(passages, "passages", first_passage)
    device = device or default_device()
    k = min(top_k, len(passages))
    kept = min(k + _SPARE, len(passages))
    indices = np.empty((len(queries), k), dtype=np.int64)
    scores = np.empty((len(queries), k), dtype=np.float32)
    if not k:
        return indices, scores
    # A group's queries and candidates stay on the device, and passages come to it block by block: the other way round,
    # a GPU would wait for copies of candidates most of the time.
    size = max(queries_per_step, _CANDIDATES_PER_GROUP // kept)
    blocks = -(-len(queries) // size) * -(-len(passages) // passages_per_step)
    with tqdm(total=blocks, desc="search", disable=not progress, unit="block") as bar, _whole_float32():
        for start in range(0, len(queries), size):
            group = slice(start, start + size)
            asked = _tensor(queries[group]).to(device)
            values, found = _candidates(asked, passages, kept, queries_per_step, passages_per_step, bar)
            exact = _exact(asked, passages, found)
            indices[group], scores[group] = (result[:, :k].cpu().numpy() for result in _in_order(found, exact))
            if kept < len(passages):
                crowded = (values[:, -1] >= values[:, k - 1] - 2 * _ROUNDING).nonzero()[:, 0].tolist()
                for row in crowded:
                    kth = float(values[row, k - 1])
                    indices[start + row], scores[start + row] = _search_one(queries[start + row], passages, kth, k)
    return indices + first_passage, scores


def search_share(
    queries: np.ndarray, passages: np.ndarray, top_k: int, folder: Path, share: int, shares: int, *, device: str
) -> None:
    """One of `shares` contiguous parts of the passages, searched; its result in `folder`, for `read_shares`."""
    first, end = (len(passages) * part // shares for part in (share, share + 1))
    found = search(queries, passages[first:end], top_k, device=device, first_passage=first, progress=share == 0)
    for name, result in zip(_SHARE_FILES, found, strict=True):
        np.save(folder / name.format(share), result)


def read_shares(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """What `search_share` left, memory-mapped, in the order of the passages: indices and scores of each share."""
    count = len(list(folder.glob(_SHARE_FILES[0].format("*"))))

    def mapped(name: str, share: int) -> np.ndarray:
        return np.load(folder / name.format(share), mmap_mode="r", allow_pickle=False)

    indices, scores = _SHARE_FILES
    return [(mapped(indices, share), mapped(scores, share)) for share in range(count)]


def merge_shares(shares: Sequence[tuple[np.ndarray, np.ndarray]], top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Each share's `search` -> that of all passages, to the last bit.

    Every share holds its exact best, and more of it than the best of all can be in it; the same order of score and
    index then chooses among them.
    """
    queries, k = len(shares[0][0]), min(top_k, sum(indices.shape[1] for indices, _ in shares))
    indices = np.empty((queries, k), dtype=np.int64)
    scores = np.empty((queries, k), dtype=np.float32)
    for start in range(0, queries, _QUERIES_PER_MERGE):
        step = slice(start, start + _QUERIES_PER_MERGE)
        found, exact = (np.concatenate([share[which][step] for share in shares], axis=1) for which in (0, 1))
        order = np.lexsort((found, -exact), axis=1)[:, :k]
        indices[step] = np.take_along_axis(found, order, axis=1)
        scores[step] = np.take_along_axis(exact, order, axis=1)
    return indices, scores


def pair_scores(
    queries: np.ndarray,
    passages: np.ndarray,
    query_rows: np.ndarray,
    passage_rows: np.ndarray,
    *,
    device: str | None = None,
) -> np.ndarray:
    """Dot products of given pairs, summed in float64 and rounded once: (p,) row numbers twice -> (p,) float32."""
    device = _with_float64(device or default_device())
    scores = np.empty(len(query_rows), dtype=np.float32)
    for start in range(0, len(query_rows), _PAIRS_PER_STEP):
        step = slice(start, start + _PAIRS_PER_STEP)
        left = torch.from_numpy(queries[query_rows[step]]).to(device)
        right = torch.from_numpy(passages[passage_rows[step]]).to(device)
        scores[step] = _dots(left, right).cpu().numpy()
    return scores


def _dots(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(p, d) twice -> (p,) float32, summed in float64."""
    return (left.double() * right.double()).sum(dim=1).float()


def _with_float64(device: str) -> str:
    return "cpu" if device.startswith("mps") else device  # Apple's GPUs have no float64


@contextlib.contextmanager
def _whole_float32() -> Iterator[None]:
    """Products in float32, whatever this process allows for its model.

    A training on a GPU allows TF32, and encoding on a CPU may allow bfloat16. Either is wrong by far more than
    `_ROUNDING`, so passages would be missed.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.fp32_precision = "none"  # what stands above it in torch.backends, which may change later
            if backend.fp32_precision != allowed:
                backend.fp32_precision = allowed


def _candidates(
    queries: torch.Tensor, passages: np.ndarray, kept: int, queries_per_step: int, passages_per_step: int, bar: tqdm
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `kept` best by float32 products: values (n, kept) and passage indices (n, kept), best first, on the device
    of the queries."""
    values = queries.new_full((len(queries), kept), -torch.inf)
    found = torch.zeros((len(queries), kept), dtype=torch.int64, device=queries.device)
    for first in range(0, len(passages), passages_per_step):
        block = _tensor(passages[first : first + passages_per_step]).to(queries.device).T
        for start in range(0, len(queries), queries_per_step):
            step = slice(start, start + queries_per_step)
            best, at = torch.topk(queries[step] @ block, min(kept, block.shape[1]), dim=1)
            both = torch.cat([values[step], best], dim=1)
            where = torch.cat([found[step], at + first], dim=1)
            values[step], chosen = torch.topk(both, kept, dim=1)
            found[step] = where.gather(1, chosen)
        bar.update()
    return values, found


def _exact(queries: torch.Tensor, passages: np.ndarray, found: torch.Tensor) -> torch.Tensor:
    """The score of every candidate: (n, kept) float32."""
    device = _with_float64(str(queries.device))
    queries, found = queries.to(device), found.to(device)
    # In the order of the passages: a step then needs neighbouring ones, which a GPU, or a disk, gives in one piece.
    wanted, order = found.reshape(-1).sort(stable=True)
    exact = torch.empty(len(wanted), device=device)
    for start in range(0, len(wanted), _PAIRS_PER_STEP):
        step = slice(start, start + _PAIRS_PER_STEP)
        rows, pairs = wanted[step], order[step]
        first, last = int(rows[0]), int(rows[-1])
        if last - first < 2 * len(rows):
            right = _tensor(passages[first : last + 1]).to(device)[rows - first]
        else:
            right = torch.from_numpy(passages[rows.cpu().numpy()]).to(device)
        exact[pairs] = _dots(queries[pairs // found.shape[1]], right)
    return exact.reshape(found.shape)


def _in_order(found: torch.Tensor, exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row by falling score, equal ones by rising passage index."""
    found, by_index = found.to(exact.device).sort(dim=1)
    exact, by_score = exact.gather(1, by_index).sort(dim=1, descending=True, stable=True)
    return found.gather(1, by_score), exact


def _search_one(query: np.ndarray, passages: np.ndarray, kth: float, k: int) -> tuple[np.ndarray, np.ndarray]:
    """One query of which more passages than were kept score like its k-th."""
    near = np.flatnonzero(passages @ query >= kth - 2 * _ROUNDING)
    exact = pair_scores(query[None], passages, np.zeros(len(near), dtype=np.int64), near, device="cpu")
    order = np.lexsort((near, -exact))[:k]
    return near[order], exact[order]


def finite_rows(matrix: np.ndarray) -> np.ndarray:
    """(n, d) -> (n,) bool: whether all numbers of a row are finite. Looks at a part at a time."""
    finite = np.empty(len(matrix), dtype=bool)
    for start in range(0, len(matrix), _ROWS_PER_LOOK):
        step = slice(start, start + _ROWS_PER_LOOK)
        finite[step] = np.isfinite(matrix[step]).all(axis=1)
    return finite


def _check_finite(matrix: np.ndarray, what: str, first: int = 0) -> None:
    broken = np.flatnonzero(~finite_rows(matrix))
    if len(broken):
        raise ModelError(
            f"{len(broken)} of {len(matrix)} embeddings of {what} are not finite numbers (first: row "
            f"{broken[0] + first}). "
            "The weights are broken, or the arithmetic overflows: try `encode_precision: float32` or another model"
        )


def _tensor(rows: np.ndarray) -> torch.Tensor:
    """The same memory: a file that is mapped for reading is not copied, and nothing here writes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(rows)
