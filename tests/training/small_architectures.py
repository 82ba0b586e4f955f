"""A base model of each common architecture: two layers of random weights, with a tokenizer like the family's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from small_problem import TOPICS, WORDS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

_SIZE = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
_BERT = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
_ROBERTA = {
    **{"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"},
    **{"cls_token": "<s>", "sep_token": "</s>"},
}


@dataclass(frozen=True)
class Architecture:
    config: str  # the configuration's class
    model: str  # the class of what is saved: decoders come as they were trained to write
    specials: dict[str, str]
    single: str  # how the tokenizer frames a text, and a pair
    pair: str
    settings: dict[str, Any] = field(default_factory=dict)
    types: bool = False  # whether the model is told which text of a pair a token is of

    @property
    def pads(self) -> bool:
        return "pad_token" in self.specials


def _decoder(name: str, specials: dict[str, str], single: str, **settings: Any) -> Architecture:
    shared = {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128}
    pair = f"{single} $B:1"
    return Architecture(f"{name}Config", f"{name}ForCausalLM", specials, single, pair, {**_SIZE, **shared, **settings})


ARCHITECTURES = {
    "BERT": Architecture(
        "BertConfig", "BertModel", _BERT, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1",
        {**_SIZE, "max_position_embeddings": 128}, types=True,
    ),
    "DistilBERT": Architecture(
        "DistilBertConfig", "DistilBertModel", _BERT, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1",
        {"n_layers": 2, "n_heads": 2, "dim": 32, "hidden_dim": 64, "max_position_embeddings": 128},
    ),
    "RoBERTa": Architecture(
        "RobertaConfig", "RobertaModel", _ROBERTA, "<s> $A </s>", "<s> $A </s> </s> $B:1 </s>",
        {**_SIZE, "max_position_embeddings": 130, "type_vocab_size": 1},
    ),
    "XLM-R": Architecture(
        "XLMRobertaConfig", "XLMRobertaModel", _ROBERTA, "<s> $A </s>", "<s> $A </s> </s> $B:1 </s>",
        {**_SIZE, "max_position_embeddings": 130, "type_vocab_size": 1},
    ),
    "MPNet": Architecture(
        "MPNetConfig", "MPNetModel", _ROBERTA, "<s> $A </s>", "<s> $A </s> </s> $B:1 </s>",
        {**_SIZE, "max_position_embeddings": 130},
    ),
    "ModernBERT": Architecture(
        "ModernBertConfig", "ModernBertModel", _BERT, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1",
        {**_SIZE, "max_position_embeddings": 128, "reference_compile": False},
    ),
    "Gemma": _decoder(
        "Gemma", {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}, "<bos> $A"
    ),
    "Qwen3": _decoder("Qwen3", {"eos_token": "<|endoftext|>"}, "$A"),
    "Mistral": _decoder("Mistral", {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}, "<s> $A"),
}  # fmt: skip


def write_base_model(folder: Path, architecture: Architecture) -> Path:
    """A folder as it would come from the Hub: config, weights and tokenizer, nothing of sentence-transformers."""
    tokenizer = _tokenizer(architecture)
    tokenizer.save_pretrained(folder)
    ids = {
        f"{name}_id": tokenizer.convert_tokens_to_ids(architecture.specials[name])
        for name in ("pad_token", "bos_token", "eos_token", "cls_token", "sep_token")
        if name in architecture.specials
    }
    torch.manual_seed(0)
    config = getattr(transformers, architecture.config)(
        vocab_size=len(tokenizer), **{"bos_token_id": None, "eos_token_id": None, **ids}, **architecture.settings
    )
    getattr(transformers, architecture.model)(config).save_pretrained(folder)
    return folder


def _tokenizer(architecture: Architecture) -> transformers.PreTrainedTokenizerFast:
    specials = list(dict.fromkeys(architecture.specials.values()))
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    inner.train_from_iterator([f"the {word} {topic} stands number" for word in WORDS for topic in TOPICS], trainer)
    inner.post_processor = processors.TemplateProcessing(
        single=architecture.single,
        pair=architecture.pair,
        special_tokens=[(token, inner.token_to_id(token)) for token in specials],
    )
    names = ["input_ids", *(["token_type_ids"] if architecture.types else []), "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=126, model_input_names=names, **architecture.specials
    )
