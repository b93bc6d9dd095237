"""Language models, embeddings and classifiers of text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nni_jackpot.modules.batches import call_model
from nni_jackpot.modules.modes import restored_modes
from nni_jackpot.search.match_dense import embeddings, values_of

_MEASURES = {
    "causal_lm": ("perplexity",),
    "masked_lm": ("perplexity",),
    "classification": ("agreement",),
    "embeddings": ("cosine", "neighbour"),
}


class LanguageTask:
    """Text, by the task of its network (`nni_jackpot.experiment.models.language.TASKS`).

    Language models are measured by perplexity. Classifiers and embeddings are compared with the dense
    network, which is the first one that is measured.

    Attributes
    ----------
    measures, has_labels
        As for `nni_jackpot.experiment.running.image_task.ImageTask`.
    """

    def __init__(self, name: str) -> None:
        self.measures: tuple[str, ...] = _MEASURES[name]
        self.has_labels = name in ("causal_lm", "masked_lm")
        self._dense: Tensor | None = None

    def loss(self, batch: Any, model: nn.Module) -> Tensor:
        """Return the mean cross-entropy of the tokens that are predicted."""
        loss, tokens = _cross_entropy(batch, model, next(model.parameters()).device)
        return loss / tokens

    @torch.no_grad()
    def measure(self, model: nn.Module, batches: Iterable[Any], device: torch.device) -> dict[str, float]:
        """Return the measures."""
        with restored_modes(model):
            model.eval()
            if self.has_labels:
                sums = [_cross_entropy(batch, model, device) for batch in batches]
                mean = sum(loss.item() for loss, _ in sums) / sum(tokens for _, tokens in sums)
                return {"perplexity": math.exp(min(mean, 700.0))}
            outputs = (embeddings(call_model(model, batch, device), batch) for batch in batches)
            found = torch.cat([output.cpu() for output in outputs])
        if self._dense is None:
            self._dense = found
        if self.measures == ("agreement",):
            return {"agreement": (found.argmax(1) == self._dense.argmax(1)).float().mean().item()}
        nearest = [_nearest(one) for one in (found, self._dense)]
        return {
            "cosine": F.cosine_similarity(found, self._dense).mean().item(),
            "neighbour": (nearest[0] == nearest[1]).float().mean().item(),
        }


def _cross_entropy(batch: Any, model: nn.Module, device: torch.device) -> tuple[Tensor, int]:
    """Return the summed cross-entropy of a batch, and the number of tokens that are predicted."""
    logits = values_of(call_model(model, batch, device))
    labels = batch.get("labels")
    if labels is None:  # each token is predicted from those before it
        logits, labels = logits[:, :-1], batch["input_ids"][:, 1:]
    labels = labels.to(logits.device)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return loss, max(1, int((labels != -100).sum()))


def _nearest(found: Tensor) -> Tensor:
    """Return the number of the nearest other text by cosine, for each text."""
    rows = F.normalize(found, dim=1)
    return (rows @ rows.T).fill_diagonal_(-2).argmax(1)
