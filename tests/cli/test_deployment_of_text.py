"""``evaluate`` and ``deploy`` of a run on text: its measures, its tokenizer, and inputs by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_language import save_network, save_text, write_run

from nni_jackpot import cli

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("kind", "forms"), [("LlamaForCausalLM", ["hf", "onnx"]), ("BertModel", ["hf", "csr"])]
)
def test_text(kind: str, forms: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "onnx" in forms:
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    save_text(tmp_path / "text.txt")
    loss = "kl" if kind.startswith("Llama") else "cosine"
    search = {"loss": loss, "blockwise": {"steps": 1}}
    file = write_run(tmp_path, save_network(tmp_path / "network", kind), comparators={}, search=search)
    assert cli.main(["search", str(file)]) == 0
    run = tmp_path / "out"
    capsys.readouterr()

    rows = {row["kind"]: row for row in json.loads((run / "results.json").read_bytes())["rows"]}
    assert cli.main(["evaluate", str(run)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "jackpot" in line)
    value = next(iter(rows["jackpot"]["measures"].values()))
    assert float(line.split("│")[2]) == pytest.approx(value, rel=1e-2)

    for form in forms:
        assert cli.main(["deploy", str(run), "--form", form, "--batch-size", "2"]) == 0, form
        printed = capsys.readouterr().out
        assert printed.count("\n") == 1
        assert f": {form}, " in printed
    folder = run / "deployed" / "hf"
    found = transformers.AutoModel.from_pretrained(folder).state_dict()
    wanted = torch.load(run / "jackpot.pth", weights_only=True)
    assert all(torch.equal(wanted[name], found[name]) for name in found if name in wanted)
    assert transformers.AutoTokenizer.from_pretrained(folder)("word1 word2")["input_ids"] == [4, 5]
