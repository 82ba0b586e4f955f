"""The names of the files that a training leaves; `training.output` says what each holds."""

JOB_FILE = "job.json"
MODEL_FOLDER = "model"
SUMMARY_FILE = "summary.json"
TRAINING_LOG_FILE = "training_log.jsonl"
SERVING_FILE = "serving.json"
CHECKPOINTS_FOLDER = "checkpoints"
