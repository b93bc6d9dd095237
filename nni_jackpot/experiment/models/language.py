"""Pre-trained networks of transformers with their tokenizers, from safetensors or GGUF files."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nni_jackpot.errors import CheckpointError, ExperimentConfigError, first_line
from nni_jackpot.runtime.extras import library

if TYPE_CHECKING:
    from nni_jackpot.experiment.models.section import LanguageModelConfig

LANGUAGE = "transformers/"
PACKAGE = "package:"

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


def load_language_model(config: LanguageModelConfig) -> LanguageModel:
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
    library = _library("transformers")
    place = _place(config.name)
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": isinstance(place, Path)}
    if isinstance(place, Path) and (file := _gguf_file(place, config.file)) is not None:
        _library("gguf")
        options["gguf_file"] = file
    elif isinstance(place, Path):
        _check_folder(place)
    elif config.file is not None:
        options["gguf_file"] = config.file
    has_bar = library.utils.logging.is_progress_bar_enabled()
    library.utils.logging.disable_progress_bar()
    try:
        found = library.AutoConfig.from_pretrained(place, **options)
        if "gguf_file" not in options and getattr(found, "quantization_config", None) is not None:
            raise ValueError("the weights are quantized: name a folder of weights in floating point")
        task = config.task or _task_of(found)
        # Without use_safetensors, transformers would unpickle .bin files.
        network = getattr(library, TASKS[task]).from_pretrained(
            place, config=found, use_safetensors=True, dtype=torch.float32, **options
        )
        tokenizer = library.AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:  # transformers raises the errors of its readers and of its HTTP client
        raise CheckpointError(f"model.name: {config.name} cannot be loaded: {first_line(error)}") from error
    finally:
        if has_bar:
            library.utils.logging.enable_progress_bar()
    return LanguageModel(network.eval(), tokenizer, task)


def _place(name: str) -> Path | str:
    """Return the folder that a name means, or an ID of the hub."""
    rest = name.removeprefix(LANGUAGE)
    if rest.startswith(PACKAGE):
        package, _, inner = rest.removeprefix(PACKAGE).partition("/")
        spec = find_spec(package) if package.isidentifier() else None
        folders = list(spec.submodule_search_locations or ()) if spec is not None else []
        if not folders:
            raise ExperimentConfigError(
                f"model.name: found {name}, but no Python package {package} is installed: install the "
                "package that has the network's files"
            )
        folder = Path(folders[0], inner)
        if not folder.is_dir():
            raise ExperimentConfigError(f"model.name: found {name}, but {folder} is not a folder")
        return folder
    path = Path(rest).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or rest.startswith((".", "~")) or rest.count("/") > 1:
        raise ExperimentConfigError(f"model.name: found {name}, but {path} is not a folder")
    return rest


def _gguf_file(folder: Path, named: str | None) -> str | None:
    """Return the GGUF file to read in a folder; None if there is none."""
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if named is not None and named not in files:
        raise ExperimentConfigError(f"model.file: found {named!r}, allowed: {', '.join(files) or 'null'}")
    if named is None and len(files) > 1 and not _has_safetensors(folder):
        raise ExperimentConfigError(f"model.file: found null, allowed: one of {', '.join(files)}")
    return named or (files[0] if files and not _has_safetensors(folder) else None)


def _has_safetensors(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json"))


def _check_folder(folder: Path) -> None:
    """Refuse a folder whose weights transformers would have to unpickle, or to fetch from elsewhere."""
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder} is an adapter of another network: merge it, and save the result")
    if _has_safetensors(folder):
        return
    pickles = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt")))
    if pickles:
        raise CheckpointError(
            f"{folder} has its weights as a pickle, {pickles[0]}, which can run code, and is not read. Load "
            "it where you trust it, and write safetensors: model.save_pretrained(FOLDER)"
        )
    raise CheckpointError(f"{folder} has no weights: neither *.safetensors nor *.gguf")


def _task_of(config: Any) -> str:
    """Return the task that the architecture in a network's config stands for."""
    names = getattr(config, "architectures", None) or ["ForCausalLM"]  # GGUF files do not say it
    return next((task for end, task in _ENDINGS.items() if str(names[0]).endswith(end)), "embeddings")


def _library(name: str) -> Any:
    return library(name, "transformers" if name == "transformers" else "real", "this network needs")
