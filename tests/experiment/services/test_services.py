"""W&B and MLflow get the values of TensorBoard; stand-in modules take the calls of the real ones."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_runs import command, write_file

from nni_jackpot.errors import JackpotError
from nni_jackpot.experiment.services import Services

Calls = list[tuple[str, Any]]


def stand_ins(calls: Calls, fails: str = "") -> dict[str, Any]:
    def call(name: str) -> Any:
        def record(*args: Any, **kwargs: Any) -> Any:
            if name == fails:
                raise ConnectionError(f"{name} is down")
            calls.append((name, (args, kwargs)))
            return SimpleNamespace(
                log=call("wandb.log"), finish=call("wandb.finish"), define_metric=call("wandb.define_metric")
            )

        return record

    names = "set_experiment", "start_run", "log_dict", "log_metrics", "end_run"
    return {
        "wandb": SimpleNamespace(init=call("wandb.init")),
        "mlflow": SimpleNamespace(**{name: call(f"mlflow.{name}") for name in names}),
    }


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    made: Calls = []
    for name, module in stand_ins(made).items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


def test_a_run_tells_both(calls: Calls, tmp_path: Path) -> None:
    file = write_file(tmp_path)
    assert command("search", file, "trackers=[wandb, mlflow]", "finetune.epochs=0") == 0
    begun = [given["name"] for name, (_, given) in calls if name == "wandb.init"]
    assert begun == [str(tmp_path / "out" / phase) for phase in ("pretrain", "search")]
    logged: list[Any] = [args[0] for name, (args, _) in calls if name == "wandb.log"]
    epochs = [values for values in logged if "epoch/overlap" in values]
    assert [values["at_epoch"] for values in epochs] == [1, 2]
    metrics = [(args[0], given["step"]) for name, (args, given) in calls if name == "mlflow.log_metrics"]
    assert [step for values, step in metrics if "epoch/overlap" in values] == [1, 2]
    for begin, end in (("wandb.init", "wandb.finish"), ("mlflow.start_run", "mlflow.end_run")):
        names = [name for name, _ in calls if name in (begin, end)]
        assert names == [begin, end] * 2
    settings = next(given["config"] for name, (_, given) in calls if name == "wandb.init")
    assert settings["search"]["epochs"] == 2


def test_a_service_that_fails_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: Calls = []
    for name, module in stand_ins(made, fails="wandb.log").items():
        monkeypatch.setitem(sys.modules, name, module)
    services = Services(["wandb", "mlflow"], Path("out"), {})
    for at in (1, 2):
        services.add("step", at, {"step/loss": 1.0})
    services.close()
    assert caplog.text.count("wandb gets no more metrics: wandb.log is down") == 1
    assert [name for name, _ in made if name == "mlflow.log_metrics"] == ["mlflow.log_metrics"] * 2


def test_a_service_that_cannot_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in stand_ins([], fails="wandb.init").items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(JackpotError, match=r"trackers: wandb cannot begin a run: wandb\.init is down"):
        Services(["wandb"], Path("out"), {}).add("step", 1, {"step/loss": 1.0})


def test_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    file = write_file(tmp_path)
    for value, words in (
        ("[wandb]", "wandb is not installed, which trackers: [wandb] needs: "),
        ("[wandb, wandb]", "trackers: found "),
        ("[comet]", "allowed: a list of names out of wandb, mlflow, each once"),
    ):
        assert command("search", file, f"trackers={value}") == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
