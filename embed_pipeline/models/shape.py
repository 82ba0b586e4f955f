"""How large a transformer is, read off the `config.json` of its folder without loading it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What architectures call the same number.
_HIDDEN = ("hidden_size", "dim", "d_model", "n_embd")
_LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
_HEADS = ("num_attention_heads", "n_heads", "n_head", "num_heads")
_INTERMEDIATE = ("intermediate_size", "hidden_dim", "d_ff", "n_inner")
_WORDS = ("vocab_size",)
_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide a transformer's memory and how it is trained."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    words: int  # of the vocabulary
    positions: int
    dropout: bool = False  # while training, unless it is set
    architecture: str = "bert"

    @property
    def layer_parameters(self) -> int:
        """Of all layers together. Embeddings are left out: a large vocabulary does not make a model a large one."""
        attention, feed_forward, rest = 4 * self.hidden**2, 2 * self.hidden * self.intermediate, 9 * self.hidden
        return self.layers * (attention + feed_forward + rest + self.intermediate)

    @property
    def parameters(self) -> int:
        return self.layer_parameters + (self.words + self.positions + 4) * self.hidden


def shape_of(folder: Path) -> ModelShape | None:
    """The shape of the model in `folder`; None where its `config.json` does not describe one transformer."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    config: dict[str, Any] = json.loads(path.read_text())
    config = config.get("text_config") or config
    hidden, layers, heads = _number(config, _HIDDEN), _number(config, _LAYERS), _number(config, _HEADS)
    if hidden is None or layers is None or heads is None:
        return None
    return ModelShape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        intermediate=_number(config, _INTERMEDIATE) or 4 * hidden,
        words=_number(config, _WORDS) or 0,
        positions=_number(config, ("max_position_embeddings", "n_positions")) or 0,
        dropout=any(isinstance(config.get(name), float) and config[name] > 0 for name in _DROPOUT),
        architecture=str(config.get("model_type")),
    )


def _number(config: dict[str, Any], names: tuple[str, ...]) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int) and config[name] > 0), None)
