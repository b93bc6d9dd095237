"""Sphinx configuration; `sphinx-build -W docs site` builds the documentation without the network."""

from __future__ import annotations

import nni_jackpot

project = "nni-jackpot"
author = copyright = "nni-jackpot maintainers"
version = release = nni_jackpot.__version__

extensions = ["sphinx.ext.autodoc", "numpydoc", "myst_parser"]
html_theme = "furo"
html_title = project

# Pages are Markdown and link to each other, to files of the repository and to headings, as they do on GitHub.
myst_heading_anchors = 3
# Reports link to anchors in HTML, which MyST does not know; the site offers them as files.
exclude_patterns = ["results/arena-*/report.md"]

# Docstrings follow the numpy convention; names in backticks are names of code.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
numpydoc_show_class_members = False
