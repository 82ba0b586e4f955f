"""The token that fills up the shorter texts of a batch: decoder models often come without one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embed_pipeline.errors import ModelError
from embed_pipeline.models.folder import POSITIONS_AFTER_PADDING

logger = logging.getLogger(__name__)


def set_padding(tokenizer: Any, model: Any, folder: Path) -> None:
    """Make tokenizer and model agree on a padding token, so that both are saved with it.

    It is the first that the model has an embedding for: the tokenizer's, the config's, or the end-of-sequence token.
    `model` is a transformers model, `folder` where it was loaded from. Raises ModelError when there is none.
    """
    if tokenizer is None:  # a model that does not read text through a transformers tokenizer
        return
    config, embeddings = model.config.get_text_config(), model.get_input_embeddings().weight.shape[0]
    token = next((id for id in _candidates(tokenizer, config) if 0 <= id < embeddings), None)
    if token is None:
        raise ModelError(
            f"the model in {folder} has neither a padding token nor an end-of-sequence token among its {embeddings} "
            "embeddings, so texts of different lengths cannot share a batch. Name one of its tokens as `pad_token` in "
            "tokenizer_config.json"
        )
    if tokenizer.pad_token_id != token:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(token)
        logger.info("the model in %s has no padding token: %r is used and saved", folder, tokenizer.pad_token)
    # A classifier over a decoder's last token finds it by the config's padding token. Models that number positions
    # from theirs on keep it: another one would shift all positions.
    if config.pad_token_id is None or config.model_type not in POSITIONS_AFTER_PADDING:
        for one in (model.config, config):
            one.pad_token_id = token


def _candidates(tokenizer: Any, config: Any) -> Iterator[int]:
    for id in (tokenizer.pad_token_id, config.pad_token_id, tokenizer.eos_token_id, config.eos_token_id):
        if isinstance(id, list):
            yield from id
        elif id is not None:
            yield id
