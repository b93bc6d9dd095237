"""Tracking services that get a run's metrics beside TensorBoard: Weights & Biases and MLflow.

Where the metrics go, to a server or to local files, is said to the services themselves, by their environment
variables: ``WANDB_MODE=offline``, ``MLFLOW_TRACKING_URI=file:FOLDER``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nni_jackpot.errors import JackpotError, first_line
from nni_jackpot.runtime.extras import library
from nni_jackpot.runtime.settings import Rule

PROJECT = "nni-jackpot"


class Service(Protocol):
    """A run at a tracking service."""

    def add(self, axis: str, at: int, values: Mapping[str, float]) -> None:
        """Add values by name, at a number of the axis ``step`` or ``epoch``."""

    def close(self) -> None:
        """End the run."""


class _Wandb:
    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        wandb = library("wandb", "tracking", "trackers: [wandb] needs")
        self._run = wandb.init(project=PROJECT, name=name, config=dict(settings))
        for axis, groups in (("step", ("step",)), ("epoch", ("epoch", "density"))):
            for group in groups:
                self._run.define_metric(f"{group}/*", step_metric=f"at_{axis}")

    def add(self, axis: str, at: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, f"at_{axis}": at})

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        self._mlflow = library("mlflow", "tracking", "trackers: [mlflow] needs")
        self._mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        self._mlflow.start_run(run_name=name)
        self._mlflow.log_dict(dict(settings), "settings.json")

    def add(self, axis: str, at: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=at)

    def close(self) -> None:
        self._mlflow.end_run()


SERVICES: dict[str, Callable[[str, Mapping[str, Any]], Service]] = {"wandb": _Wandb, "mlflow": _Mlflow}

SERVICE_NAMES = Rule(
    f"of names out of {', '.join(SERVICES)}, each once",
    lambda value: (
        all(type(name) is str and name in SERVICES for name in value) and len(set(value)) == len(value)
    ),
)


def check_services(names: Sequence[str]) -> None:
    """Check that the libraries of services are installed; raises MissingLibraryError."""
    for name in names:
        library(name, "tracking", f"trackers: [{name}] needs")


@dataclass
class Services:
    """The services of one phase of a run, begun with its first values.

    A service that fails later is left out for the rest of the phase, with one warning: no search is lost
    because a server is.

    Attributes
    ----------
    names
        Names of the services.
    folder
        Folder of the phase, after which its runs at the services are named.
    settings
        Settings of the run.
    """

    names: Sequence[str]
    folder: Path
    settings: Mapping[str, Any]
    _open: dict[str, Service] | None = field(default=None, init=False)

    def add(self, axis: str, at: int, values: Mapping[str, float]) -> None:
        """Add values by name to all services.

        Raises
        ------
        JackpotError
            If a service cannot begin a run, for example without a login.
        """
        if self._open is None:
            self._open = {name: self._begun(name) for name in self.names}
        self._each(lambda service: service.add(axis, at, values))

    def close(self) -> None:
        """End the runs."""
        self._each(lambda service: service.close())
        self._open = None

    def _begun(self, name: str) -> Service:
        try:
            return SERVICES[name](str(self.folder), self.settings)
        except JackpotError:
            raise
        except Exception as error:  # of the service's client
            raise JackpotError(f"trackers: {name} cannot begin a run: {first_line(error)}") from error

    def _each(self, call: Callable[[Service], None]) -> None:
        for name, service in list((self._open or {}).items()):
            try:
                call(service)
            except Exception as error:  # of the service's client
                assert self._open is not None
                del self._open[name]
                logging.getLogger(__name__).warning("%s gets no more metrics: %s", name, first_line(error))
