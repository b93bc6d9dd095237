"""Pre-trained networks of transformers with their tokenizers, from safetensors or GGUF files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nni_jackpot.experiment.models.folders import config_of, loading, source_of, transformers

if TYPE_CHECKING:
    from nni_jackpot.experiment.models.section import TransformersConfig

# The class of transformers that loads the network of a task.
TASKS = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
    "embeddings": "AutoModel",
}
_ENDINGS = {
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForMaskedLM": "masked_lm",
    "ForSequenceClassification": "classification",
}


@dataclass(frozen=True)
class LanguageModel:
    """A network, in evaluation mode and float32, with its tokenizer and its task."""

    network: nn.Module
    tokenizer: Any
    task: str


def load_language_model(config: TransformersConfig) -> LanguageModel:
    """Load the network that a config names.

    Raises
    ------
    ExperimentConfigError
        If the folder, the package or the file does not exist.
    CheckpointError
        If the folder has neither safetensors nor GGUF files, or transformers cannot load it without running
        code of the folder.
    MissingLibraryError
        If transformers is not installed, or gguf for GGUF files.
    """
    source = source_of(config.name, config.file)
    with loading(config.name):
        found = config_of(source)
        task = config.task or _task_of(found)
        # Without use_safetensors, transformers would unpickle .bin files.
        network = getattr(transformers(), TASKS[task]).from_pretrained(
            source.place, config=found, use_safetensors=True, dtype=torch.float32, **source.options
        )
        tokenizer = transformers().AutoTokenizer.from_pretrained(source.place, **source.options)
    return LanguageModel(network.eval(), tokenizer, task)


def _task_of(config: Any) -> str:
    """Return the task that the architecture in a network's config stands for."""
    names = getattr(config, "architectures", None) or ["ForCausalLM"]  # GGUF files do not say it
    return next((task for end, task in _ENDINGS.items() if str(names[0]).endswith(end)), "embeddings")
