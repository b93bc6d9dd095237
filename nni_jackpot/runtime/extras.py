"""Optional libraries: which extra of the package has them, and the command that installs it here."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from nni_jackpot.errors import MissingLibraryError

_NAME = "nni-jackpot"

# The modules that each extra installs, as setup.cfg has them, except those for tests and documentation.
EXTRAS: dict[str, tuple[str, ...]] = {
    "plot": ("matplotlib",),
    "tensorboard": ("tensorboard",),
    "lightning": ("pytorch_lightning",),
    "transformers": ("transformers", "accelerate"),
    "timm": ("timm",),
    "real": ("transformers", "gguf"),
    "tracking": ("wandb", "mlflow"),
    "deploy": ("onnx", "onnxscript", "onnxruntime", "openvino"),
}


def library(name: str, extra: str, needs_it: str) -> Any:
    """Import an optional library.

    Parameters
    ----------
    name
        Name of the module.
    extra
        The extra that installs it.
    needs_it
        What needs the library, and the verb: ``"ONNX files need"``.

    Raises
    ------
    MissingLibraryError
        If the library is not installed; the message has the command that installs it.
    """
    try:
        return import_module(name)
    except ImportError:
        raise MissingLibraryError(
            f"{name} is not installed, which {needs_it}: {install_command(extra)}"
        ) from None


def install_command(extra: str) -> str:
    """Return the command that installs an extra, for the way in which the package itself was installed.

    An installation from a folder, a file or a repository names that place again (PEP 610): the package's name
    alone would be looked up in an index that need not have it.
    """
    try:
        found = distribution(_NAME)
    except PackageNotFoundError:
        root = Path(__file__).parents[2]
        if (root / "setup.cfg").is_file():  # run from its source
            return f'pip install -e "{root}[{extra}]"'
        return f"pip install {' '.join(EXTRAS[extra])}"
    pip = "uv pip" if (found.read_text("INSTALLER") or "").strip() == "uv" else "pip"
    return f"{pip} install {_requirement(found, extra)}"


def _requirement(found: Distribution, extra: str) -> str:
    """Return an extra of an installed distribution, as an argument of pip."""
    try:
        origin = json.loads(found.read_text("direct_url.json") or "{}")
        url, editable = origin["url"], bool(origin.get("dir_info", {}).get("editable"))
        vcs = origin.get("vcs_info")
    except (ValueError, LookupError, TypeError, AttributeError):
        return f'"{_NAME}[{extra}]"'
    if vcs:
        revision = vcs.get("requested_revision")
        url = f"{vcs['vcs']}+{url}" + (f"@{revision}" if revision else "")
    return f'-e "{_NAME}[{extra}] @ {url}"' if editable else f'"{_NAME}[{extra}] @ {url}"'
