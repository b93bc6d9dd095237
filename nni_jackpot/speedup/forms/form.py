"""What a deployment form is, and the registry of all forms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypeVar

from torch import nn

from nni_jackpot.masks import Masks
from nni_jackpot.runtime.registry import Registry
from nni_jackpot.speedup.calls import Call, Inputs

# Called with the arguments of the model; returns tensors, or tensors nested as the model nests them.
Runner: TypeAlias = Callable[..., Any]


@dataclass(frozen=True)
class Jackpot:
    """What a form is made of.

    Attributes
    ----------
    model
        The masked network, on the CPU, in eval mode. A form does not change it.
    masks
        NNI's masks of the network.
    example
        Arguments of the network, on the CPU.
    batches
        Inputs for calibration; empty if there are none.
    tokenizer
        Tokenizer of a language model; None without one.
    """

    model: nn.Module
    masks: Masks
    example: Call
    batches: Iterable[Inputs] = ()
    tokenizer: Any = None


class Form(ABC):
    """A file or folder in which a jackpot is deployed, and a way to run it.

    `nni_jackpot.speedup.deploy` calls `check`, `write` and `load`. It writes atomically, compares the outputs
    of what was loaded with those of the masked network, and measures size and latency.

    Attributes
    ----------
    name
        Name in the registry, set by `register_form`.
    suffix
        End of the file's name, such as ``.onnx``; empty for a folder.
    tolerance
        Largest difference of an output, as a share of the largest value of the output; 0 if outputs must be
        equal bit for bit. None for rounding errors: the square root of the machine epsilon of the output's
        dtype, 3.5e-4 for float32.
    """

    name: ClassVar[str] = ""
    suffix: ClassVar[str] = ""
    tolerance: ClassVar[float | None] = None

    def check(self, jackpot: Jackpot) -> None:  # noqa: B027  # not every form refuses something
        """Refuse masks, networks or machines that the form is not for; called before anything is written.

        Raises
        ------
        MaskError
            If the form cannot take the masks.
        SpeedupError
            If it cannot take the network, or this machine cannot run it.
        MissingLibraryError
            If a library is not installed.
        """

    @abstractmethod
    def write(self, jackpot: Jackpot, path: Path) -> None:
        """Write the file, or fill the empty folder.

        Parameters
        ----------
        jackpot
            The masked network.
        path
            A temporary place of the final name.
        """

    @abstractmethod
    def load(self, path: Path, jackpot: Jackpot) -> Runner:
        """Read what `write` has written; return a function that runs it.

        Parameters
        ----------
        path
            The place that `write` was given.
        jackpot
            The masked network.

        Returns
        -------
        Callable
            Takes the arguments of the network, and returns its outputs.
        """

    def reference(self, jackpot: Jackpot) -> Runner:
        """Return the function that outputs and latency are compared with: the masked network in PyTorch."""
        return jackpot.model


FORMS = Registry[type[Form]]("deployment form", r"[A-Za-z0-9_]+(:[0-9]+)?")

F = TypeVar("F", bound=type[Form])


def register_form(name: str) -> Callable[[F], F]:
    """Return a class decorator that registers a deployment form.

    Parameters
    ----------
    name
        Name for `nni_jackpot.speedup.deploy` and ``nni-jackpot deploy --form``: letters, digits and
        underscores; it may end in a colon and digits, as ``2:4`` does.

    Raises
    ------
    ValueError
        If the name is not allowed, or belongs to another form.
    """
    return FORMS.register_class(name)
