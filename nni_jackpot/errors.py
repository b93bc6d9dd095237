"""Errors of input and of runs, each of its own type, all of them `JackpotError`.

An argument that no call could take, whatever the model and the files, is a plain ValueError.
"""


class JackpotError(Exception):
    """Base of all errors raised by nni_jackpot for bad input or a failed run."""


class ConfigListError(JackpotError, ValueError):
    """An entry of an NNI config list is malformed, or asks for what cannot be honoured."""


class EmptyMatchError(ConfigListError):
    """The config list, or one of its entries, selects no module of the model."""


class SparseRatioError(ConfigListError):
    """A sparse ratio is missing, not a number, or outside [0, 1)."""


class TargetWithoutParametersError(ConfigListError):
    """The config list selects a module or target that holds no parameter to prune."""


class WeightDtypeError(JackpotError, TypeError):
    """A target's weights have no values, or none that scores can have a gradient of."""


class WeightValueError(JackpotError, ValueError):
    """A target's weights are NaN or infinite, so that they cannot be ranked."""


class NothingSearchedError(JackpotError, RuntimeError):
    """A search took no step, or scores had no gradient: the masks would be those that it started from."""


class NothingKeptError(ConfigListError):
    """A target is so small, or its budget so low, that none of its weights would be kept."""


class MaskError(JackpotError, ValueError):
    """Masks do not fit the model, or do not fit each other."""


class CalibrationError(JackpotError, ValueError):
    """The evaluator's training loop does not give the losses that a pruning criterion needs."""


class SearchDivergedError(JackpotError, FloatingPointError):
    """The loss or a score became NaN or infinite during the search."""


class TrainingDivergedError(JackpotError, FloatingPointError):
    """The loss became NaN or infinite while weights were trained, before or beside the search."""


class SpeedupError(JackpotError):
    """A model cannot be had in a faster form, or that form does not compute what the model computes."""


class MissingLibraryError(JackpotError, ImportError):
    """An optional library is not installed."""


class CheckpointError(JackpotError):
    """A checkpoint or mask file is missing, unreadable, or belongs to another model."""


class TicketError(CheckpointError, ValueError):
    """A ticket or a sparse checkpoint is damaged, no such file, or of a newer version."""


class OtherBaseError(TicketError):
    """A ticket was found on other weights than those it is to be applied to."""


class RunFolderError(JackpotError, ValueError):
    """A folder holds no finished run, or one of a run's files is damaged."""


class OutputFolderError(JackpotError, OSError):
    """The output folder cannot be created or written."""


class DatasetNotFoundError(JackpotError, FileNotFoundError):
    """The data folder lacks the files of the dataset."""


class ExperimentConfigError(JackpotError, ValueError):
    """A YAML file has an unknown key, a value of the wrong type or a value out of range."""


class BlocksError(JackpotError, ValueError):
    """The blocks of a network cannot be found, or a network does not run them one after another."""
