"""Error types for bad input and failed runs, derived from `JackpotError`; interruptions; shared wording.

An argument that is invalid for every model and file raises a plain ValueError.
"""

from collections.abc import Sequence


class JackpotError(Exception):
    """Base of all errors raised by nni_jackpot for bad input or a failed run."""


class ConfigListError(JackpotError, ValueError):
    """An entry of an NNI config list is malformed, or asks for something unsupported."""


class EmptyMatchError(ConfigListError):
    """The config list, or one of its entries, selects no module of the model."""


class SparseRatioError(ConfigListError):
    """A sparse ratio is missing, not a number, or outside [0, 1)."""


class TargetWithoutParametersError(ConfigListError):
    """The config list selects a module or target without a parameter to prune."""


class WeightDtypeError(JackpotError, TypeError):
    """A target's weights have no values, or a dtype without gradients."""


class WeightValueError(JackpotError, ValueError):
    """A target's weights are NaN or infinite and cannot be ranked."""


class NothingSearchedError(JackpotError, RuntimeError):
    """A search took no step, or scores had no gradient: the masks would equal the initial masks."""


class NothingKeptError(ConfigListError):
    """A target is too small, or its budget too low, to keep any weight."""


class MaskError(JackpotError, ValueError):
    """Masks do not fit the model, or do not fit each other."""


class CalibrationError(JackpotError, ValueError):
    """The evaluator's training loop does not produce the evidence that a pruning criterion needs."""


class SearchDivergedError(JackpotError, FloatingPointError):
    """The loss or a score became NaN or infinite during the search."""


class TrainingDivergedError(JackpotError, FloatingPointError):
    """The loss became NaN or infinite while weights were trained (pretraining or a comparator)."""


class SpeedupError(JackpotError):
    """A model cannot be converted to a faster form, or the converted model computes something else."""


class MissingLibraryError(JackpotError, ImportError):
    """An optional library is not installed."""


class CheckpointError(JackpotError):
    """A checkpoint or mask file is missing, unreadable, or belongs to another model."""


class TicketError(CheckpointError, ValueError):
    """A ticket or sparse checkpoint is damaged, a different kind of file, or of a newer version."""


class OtherBaseError(TicketError):
    """A ticket is applied to weights that differ from the weights it was found on."""


class RunFolderError(JackpotError, ValueError):
    """A folder contains no finished run, or a file of the run is damaged."""


class OutputFolderError(JackpotError, OSError):
    """The output folder cannot be created or written."""


class DatasetNotFoundError(JackpotError, FileNotFoundError):
    """The data folder lacks the files of the dataset."""


class ExperimentConfigError(JackpotError, ValueError):
    """A YAML file has an unknown key, a value of the wrong type or a value out of range."""


class BlocksError(JackpotError, ValueError):
    """The blocks of a network cannot be found, or a network does not run them one after another."""


class Interrupted(KeyboardInterrupt):
    """An interruption, with the progress of the run: ``at step 120 of 900``."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def first_few(findings: Sequence[str], count: int = 3, separator: str = "; ") -> str:
    """Join the first few findings, and count the others: ``a; b and 3 more``."""
    more = f" and {len(findings) - count} more" if len(findings) > count else ""
    return f"{separator.join(findings[:count])}{more}"
