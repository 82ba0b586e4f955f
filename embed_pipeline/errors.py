"""The errors a user is meant to read.

Each says where (file, row, key), what was found, what was expected and how to mend it. Anything else that is
raised is a bug of ours and shows its traceback.
"""


class UserError(Exception):
    """Bad input or configuration: the message alone is enough to mend it.

    `passing` tells a cause that may be gone by itself soon: then trying again, without changing anything, may help.
    """

    def __init__(self, message: str, *, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


class ConfigurationError(UserError):
    """A key, type or path in a pipeline's YAML (or in a run's overrides) cannot be right."""


class SourceError(UserError):
    """A raw file cannot be read as what the pipeline says it is."""


class CleaningError(UserError):
    """Nothing trustworthy is left after cleaning, or a promise about the splits cannot be kept."""


class ModelError(UserError):
    """A model cannot be found, is not the one that was asked for, or cannot be loaded."""


class ArtifactError(UserError):
    """An artifact is missing, incomplete or not the one its manifest describes."""


class DiskError(UserError):
    """A disk is full, or the store may not be written or read."""


class TrainingError(UserError):
    """A training cannot start or has failed; carries the first failing rank's cause."""


class GateError(UserError):
    """A candidate may not take the champion's place, or what should take it back cannot be named."""


class TrackingError(UserError):
    """MLflow was needed and did not answer, or refused."""


class HubError(UserError):
    """The Hugging Face Hub may not be reached, or refused, or what is to be pushed may not be."""
