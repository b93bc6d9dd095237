"""The benchmarks of language models run, on tiny networks; what they measure there means nothing."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny_language import save_network, save_text

from nni_jackpot.experiment.data.section import TextConfig
from nni_jackpot.experiment.data.text import paragraphs
from nni_jackpot.experiment.models.language import load_language_model
from nni_jackpot.experiment.models.section import TransformersConfig

pytest.importorskip("transformers")

FOLDER = Path(__file__).parents[1] / "benchmarks" / "language"
OPTIONS = ["--pattern", "2:4", "--steps", "2", "--checks", "1", "--polish_steps", "2", "--batch", "4"]


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def prepare(name: str, kind: str, *options: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(FOLDER))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *OPTIONS, *options])
        for module in ("text", "comparators", "methods", "end_to_end", name):
            monkeypatch.delitem(sys.modules, module, raising=False)
        module = importlib.import_module(name)
        folder = save_network(tmp_path / "network", kind)
        found = load_language_model(TransformersConfig(name=f"transformers/{folder}"))
        text = TextConfig(name="text", root=str(save_text(tmp_path / "text.txt", 80)))
        monkeypatch.setattr(module, "load", lambda: (found.network, found.tokenizer))
        monkeypatch.setattr(module, "handbook", lambda: paragraphs(text))
        monkeypatch.setattr(module, "HELD_OUT", 8)
        monkeypatch.setattr(module, "TOKENS", 16)
        return module

    return prepare


def test_smollm2(benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark("smollm2", "LlamaForCausalLM", "--sequences", "16").main()
    rows = [
        line.split(" | ")[0].strip("| ") for line in capsys.readouterr().out.splitlines() if line[0] == "|"
    ]
    assert {"dense", "wanda", "sparsegpt", "swaps", "blocks", "polish"} <= {*rows}


def test_minilm(benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark("minilm", "BertModel", "--paragraphs", "40", "--more", "4").main()
    rows = [
        line.split(" | ")[0].strip("| ") for line in capsys.readouterr().out.splitlines() if line[0] == "|"
    ]
    assert {"wanda", "sparsegpt", "swaps", "blocks", "polish"} <= {*rows}
