"""What a model folder says of itself, read without loading it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from embed_pipeline.errors import ModelError
from embed_pipeline.settings import RerankerSettings

logger = logging.getLogger(__name__)

PASSAGE_PROMPT_NAMES = ("document", "passage", "corpus")
# Their positions are numbered from pad_token_id + 1 (of 514 in XLM-R, 512 are usable).
POSITIONS_AFTER_PADDING = {
    *("camembert", "data2vec-text", "ibert", "longformer", "mpnet", "roberta", "roberta-prelayernorm"),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
}


def usable_length(folder: Path) -> int | None:
    """Tokens a text may have, special tokens included; None where neither positions nor tokenizer set a limit.

    The positions decide where there are any: the tokenizer's `model_max_length` is lowered by whoever saves a model
    with a shorter maximum length, without the model being able to do less.
    """
    config = _read(folder / "config.json")
    config = config.get("text_config") or config
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if isinstance(positions, int) and positions > 0:
        after_padding = config.get("model_type") in POSITIONS_AFTER_PADDING
        padding = config.get("pad_token_id")
        return positions - ((1 if padding is None else padding) + 1) if after_padding else positions
    limit = _read(folder / "tokenizer_config.json").get("model_max_length")
    # Tokenizers without a limit say 1e30.
    return int(limit) if limit is not None and limit < 1e9 else None


def own_lengths(folder: Path) -> tuple[int | None, int | None]:
    """Tokens to which an embedder's authors cut a query and a passage, at most what `usable_length` allows.

    None where neither says anything.
    """
    told, tokenizer = _read(folder / "sentence_bert_config.json"), _read(folder / "tokenizer_config.json")
    of_any = told.get("max_seq_length") or tokenizer.get("model_max_length")

    def least(limit: Any) -> int | None:
        limits = (limit or of_any, usable_length(folder))
        return min((int(one) for one in limits if one is not None and 0 < one < 1e9), default=None)

    return least(told.get("query_length")), least(told.get("document_length"))


def own_prompts(folder: Path) -> tuple[str, str]:
    """What an embedder's authors put before a query and a passage."""
    prompts = _read(folder / "config_sentence_transformers.json").get("prompts") or {}
    of_passages = next((prompts[name] for name in PASSAGE_PROMPT_NAMES if prompts.get(name)), "")
    return prompts.get("query") or "", of_passages


def pair_length(folder: Path, settings: RerankerSettings) -> int:
    """Tokens of query, passage and special tokens together, for a reranker that starts from the model in `folder`.

    Lengths that were asked for and do not fit raise ModelError; defaults are cut to what the model has.
    """
    wanted = settings.query_max_length + settings.passage_max_length
    limit = usable_length(folder)
    if limit is None or wanted <= limit:
        return wanted
    defaults = RerankerSettings.model_fields
    if any(getattr(settings, k) != defaults[k].default for k in ("query_max_length", "passage_max_length")):
        raise ModelError(
            f"reranker.query_max_length ({settings.query_max_length}) + reranker.passage_max_length "
            f"({settings.passage_max_length}) ask for {wanted} tokens a pair, but the model in {folder} can take "
            f"{limit}. Lower one of them, or choose a base model that takes longer texts"
        )
    logger.warning("pairs are cut to %d tokens, of %d by default: the model in %s takes no more", limit, wanted, folder)
    return limit


def has_trained_head(folder: Path) -> bool:
    """Whether a model folder is a cross-encoder already, rather than an encoder that would get a fresh head."""
    architectures = _read(folder / "config.json").get("architectures") or ()
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        return True
    modules = folder / "modules.json"
    return modules.is_file() and "cross_encoder" in modules.read_text()


def writes_text(folder: Path) -> bool:
    """Whether a model folder is a plain decoder that predicts words, and does not say how it would score pairs."""
    architectures = _read(folder / "config.json").get("architectures") or ()
    return any(name.endswith("ForCausalLM") for name in architectures[:1]) and not has_trained_head(folder)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found
