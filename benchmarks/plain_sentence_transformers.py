"""What one writes with sentence-transformers alone; `training_speed.py` runs it with a JSON file of settings."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from datasets import load_dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss


def main(settings_file: Path) -> None:
    settings = json.loads(settings_file.read_text())
    model = SentenceTransformer(settings["model"], device="cpu" if settings["use_cpu"] else None)
    model.max_seq_length = settings["max_length"]
    arguments = SentenceTransformerTrainingArguments(
        output_dir=settings["output"],
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        weight_decay=0.01,
        warmup_steps=0.1,
        bf16=settings["bf16"],
        use_cpu=settings["use_cpu"],
        batch_sampler="no_duplicates",
        dataloader_drop_last=True,
        logging_steps=settings["logging_steps"],
        save_strategy="no",
        report_to="none",
        seed=settings["seed"],
    )
    rows = load_dataset("json", data_files=settings["rows"], split="train", cache_dir=settings["cache"])
    loss = MultipleNegativesRankingLoss(
        model, scale=1 / settings["temperature"], gather_across_devices=settings["processes"] > 1
    )
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=rows, loss=loss).train()
    model.save_pretrained(settings["output"], create_model_card=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
