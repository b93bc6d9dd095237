"""``transformers.Trainer`` searches a jackpot by a callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import same
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nni_jackpot import EdgePopup, LotteryJackpotPruner, apply_masks
from nni_jackpot.errors import CheckpointError, NothingSearchedError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from nni_jackpot.integrations.transformers import JackpotCallback  # noqa: E402

LINEAR = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
ROWS, BATCH = 48, 8
LR = 0.05  # weights do change sides in a few steps


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
    )


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(1, 50, (8,), generator=generator) for _ in range(ROWS)]
    return [{"input_ids": t, "labels": t} for t in tokens]


class InOrder(transformers.Trainer):
    """A trainer without shuffling, whose batches an own loop can take too."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer_of(
    model: nn.Module, folder: Path, kind: Any = transformers.Trainer, callbacks: Any = (), **options: Any
) -> Any:
    arguments = {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, **options}
    settings = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=BATCH, max_grad_norm=0.0, **arguments
    )
    data = rows()
    return kind(model, settings, train_dataset=data, eval_dataset=data[:8], callbacks=list(callbacks))


def search(model: nn.Module, folder: Path, resume: str | None = None, **options: Any) -> tuple[Any, Any]:
    """Return pruner and callback after a training."""
    pruner = LotteryJackpotPruner(model, LINEAR, method=EdgePopup(lr=LR))
    callback = JackpotCallback(pruner)
    trainer_of(model, folder, callbacks=[callback], **options).train(resume_from_checkpoint=resume)
    return pruner, callback


@pytest.mark.honours("JackpotCallback", "gradient accumulation", "mixed precision")
@pytest.mark.parametrize(
    ("accumulated", "options"),
    [(1, {}), (3, {}), (1, {"bf16": True}), (1, {"eval_strategy": "steps", "eval_steps": 2})],
    ids=["plain", "accumulation", "bf16", "evaluation in the middle"],
)
def test_the_masks_are_those_of_a_loop_of_your_own(
    accumulated: int, options: dict[str, Any], tmp_path: Path
) -> None:
    model, twin = llama(), llama()
    before = {name: value.clone() for name, value in model.named_parameters()}
    torch.manual_seed(0)
    pruner = LotteryJackpotPruner(model, LINEAR, method=EdgePopup(lr=LR))
    start, callback = pruner.get_masks(), JackpotCallback(pruner)
    options = {"gradient_accumulation_steps": accumulated, "num_train_epochs": 2, **options}
    trainer_of(model, tmp_path, InOrder, [callback], **options).train()
    pruner.unwrap_model()
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert all(value.requires_grad for value in model.parameters())

    torch.manual_seed(0)
    own = LotteryJackpotPruner(twin, LINEAR, method=EdgePopup(lr=LR))
    steps = 2 * ROWS // BATCH // accumulated
    loop = own.begin(total_steps=steps)
    batches = [
        {key: torch.stack([row[key] for row in rows()[i : i + BATCH]]) for key in ("input_ids", "labels")}
        for i in range(0, ROWS, BATCH)
    ]
    twin.train()
    for step in range(steps):
        for i in range(accumulated):
            with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in options):
                loss = twin(**batches[(step * accumulated + i) % len(batches)]).loss
            (loss / accumulated).backward()
        loop.step()
    masks = loop.finish()
    assert not same(start, masks)
    assert _differing(callback.masks, masks) <= (0 if accumulated == 1 else 2)  # sums in another order


def _differing(one: Any, other: Any) -> int:
    return sum(int((one[n]["weight"] != other[n]["weight"]).sum()) for n in one)


@pytest.mark.honours("JackpotCallback", "resume")
def test_a_search_resumes_from_the_trainer_s_checkpoint(tmp_path: Path) -> None:
    whole = search(llama(), tmp_path / "whole", num_train_epochs=2)[1].masks
    saving = {"save_strategy": "steps", "save_steps": 5, "num_train_epochs": 2}
    saved = search(llama(), tmp_path / "saved", **saving)[1].masks
    assert same(saved, whole)
    checkpoint = tmp_path / "saved" / "checkpoint-5"
    resumed = search(llama(), tmp_path / "saved", str(checkpoint), **saving)[1].masks
    assert same(resumed, whole)

    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        names = list(file.keys())
    scores = [name for name in names if name.endswith("weight_score")]
    optimizer = torch.load(checkpoint / "optimizer.pt")
    state = torch.load(checkpoint / "jackpot_search.pt")
    assert scores
    assert not optimizer["state"]  # the trainer's optimizer has never seen a gradient
    assert not any(
        torch.is_floating_point(t) and t.dim() > 1
        for t in tree_leaves({**state, "optimizer": 0})
        if isinstance(t, Tensor)
    )
    assert not any(name.endswith("_nni_wrapper.weight") for name in names)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:100])])
def test_a_checkpoint_without_its_search_is_refused(damage: Any, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 5, "num_train_epochs": 1}
    search(llama(), tmp_path, **saving)
    damage(tmp_path / "checkpoint-5" / "jackpot_search.pt")
    with pytest.raises(CheckpointError, match=r"jackpot_search\.pt"):
        search(llama(), tmp_path, str(tmp_path / "checkpoint-5"), **saving)


def test_a_checkpoint_of_another_search_is_refused(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 5, "num_train_epochs": 1}
    search(llama(), tmp_path, **saving)
    path = tmp_path / "checkpoint-5" / "jackpot_search.pt"
    state = torch.load(path)
    state["masks"].popitem()
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="belongs to another search"):
        search(llama(), tmp_path, str(tmp_path / "checkpoint-5"), **saving)


def test_an_optimizer_without_the_scores_is_refused(tmp_path: Path) -> None:
    model = llama()
    weights = [*model.parameters()]
    trainer = trainer_of(model, tmp_path)
    trainer.optimizer = torch.optim.SGD(weights, lr=1.0)
    pruner = LotteryJackpotPruner(model, LINEAR)
    trainer.add_callback(JackpotCallback(pruner))
    with pytest.raises(NothingSearchedError, match="does not hold the scores"):
        trainer.train()


def test_the_sparse_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model = llama()
    pruner, callback = search(model, tmp_path, num_train_epochs=1)
    tokens = torch.arange(1, 17).view(2, 8)
    with torch.no_grad():
        wrapped = model.eval()(tokens).logits
        pruner.unwrap_model()
        apply_masks(model, callback.masks).save_pretrained(tmp_path / "sparse")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").eval()
        assert torch.equal(loaded(tokens).logits, wrapped)


def test_the_best_model_is_loaded_with_its_masks(tmp_path: Path) -> None:
    options = {"save_strategy": "epoch", "eval_strategy": "epoch", "num_train_epochs": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    pruner, callback = search(llama(), tmp_path, **options, **best)
    for targets in callback.masks.values():
        assert int((targets["weight"] == 0).sum()) == targets["weight"].numel() // 2
    assert same(pruner.get_masks(), callback.masks)


def test_the_search_ends_no_worse_than_it_began_on_held_out_batches(tmp_path: Path) -> None:
    model = llama()
    batch = {key: torch.stack([row[key] for row in rows()[:8]]) for key in ("input_ids", "labels")}

    @torch.no_grad()
    def held_out() -> Tensor:
        return model(**batch).loss

    pruner = LotteryJackpotPruner(model, LINEAR, method=EdgePopup(lr=100.0))  # which destroys any mask
    model.eval()
    before = held_out()
    callback = JackpotCallback(pruner, held_out=held_out)
    trainer_of(model, tmp_path, callbacks=[callback], num_train_epochs=2).train()
    model.eval()
    assert held_out() <= before
