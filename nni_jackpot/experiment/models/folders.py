"""Networks of transformers in folders, in installed packages and on the Hugging Face hub; nothing is run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from nni_jackpot.errors import CheckpointError, ExperimentConfigError, JackpotError, first_line
from nni_jackpot.runtime.extras import library

TRANSFORMERS = "transformers/"
PACKAGE = "package:"


class Source(NamedTuple):
    """What ``from_pretrained`` of transformers reads, and options with which it runs no code."""

    place: Path | str
    options: dict[str, Any]


def transformers() -> Any:
    """Return the library; raises MissingLibraryError without it."""
    return library("transformers", "transformers", "this network needs")


def source_of(name: str, file: str | None = None) -> Source:
    """Return the source of a network's files.

    Parameters
    ----------
    name
        ``transformers/`` and a folder, ``package:NAME/FOLDER`` or an ID of the hub.
    file
        GGUF file in the folder; None for the only one.

    Raises
    ------
    ExperimentConfigError
        If the folder, the package or the file does not exist.
    CheckpointError
        If the folder has neither safetensors nor GGUF files.
    MissingLibraryError
        If the library that reads the files is not installed.
    """
    transformers()
    place = _place(name)
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": isinstance(place, Path)}
    if isinstance(place, Path) and (own := _gguf_file(place, file)) is not None:
        library("gguf", "real", "this network needs")
        options["gguf_file"] = own
    elif isinstance(place, Path):
        _check_folder(place)
    elif file is not None:
        options["gguf_file"] = file
    return Source(place, options)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Give the errors of transformers one type, and load without a progress bar, for the block.

    Raises
    ------
    CheckpointError
        For an error of transformers.
    """
    logs = transformers().utils.logging
    has_bar = logs.is_progress_bar_enabled()
    logs.disable_progress_bar()
    try:
        yield
    except JackpotError:
        raise
    except Exception as error:  # transformers raises the errors of its readers and of its HTTP client
        raise CheckpointError(f"model.name: {name} cannot be loaded: {first_line(error)}") from error
    finally:
        if has_bar:
            logs.enable_progress_bar()


def config_of(source: Source) -> Any:
    """Return transformers' config of a network.

    Raises
    ------
    ValueError
        If the weights are quantized.
    """
    found = transformers().AutoConfig.from_pretrained(source.place, **source.options)
    if "gguf_file" not in source.options and getattr(found, "quantization_config", None) is not None:
        raise ValueError("the weights are quantized: name a folder of weights in floating point")
    return found


def _place(name: str) -> Path | str:
    """Return the folder that a name means, or an ID of the hub."""
    rest = name.removeprefix(TRANSFORMERS)
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
