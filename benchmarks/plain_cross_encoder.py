"""What one writes with sentence-transformers alone for a reranker; `training_speed.py` runs it with a JSON file of
settings."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from datasets import load_dataset
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss


def main(settings_file: Path) -> None:
    settings = json.loads(settings_file.read_text())
    model = CrossEncoder(
        settings["model"],
        num_labels=1,
        max_length=2 * settings["max_length"],
        device="cpu" if settings["use_cpu"] else None,
    )
    arguments = CrossEncoderTrainingArguments(
        output_dir=settings["output"],
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["batch_size"] * settings["group_size"],
        learning_rate=settings["learning_rate"],
        weight_decay=0.01,
        warmup_steps=0.1,
        bf16=settings["bf16"],
        use_cpu=settings["use_cpu"],
        dataloader_drop_last=True,
        ddp_find_unused_parameters=False,
        logging_steps=settings["logging_steps"],
        save_strategy="no",
        report_to="none",
        seed=settings["seed"],
    )
    rows = load_dataset("json", data_files=settings["rows"], split="train", cache_dir=settings["cache"])
    CrossEncoderTrainer(model=model, args=arguments, train_dataset=rows, loss=BinaryCrossEntropyLoss(model)).train()
    model.save_pretrained(settings["output"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
