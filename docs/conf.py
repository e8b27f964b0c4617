"""The documentation: `python -m sphinx -W -b html docs docs/_build` builds it, offline; every warning is an error."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

from cameo.version import __version__

project = "cameo"
author = "the authors of cameo-diffusion"
release = version = __version__
html_title = f"cameo {__version__}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "from_code", "repository_files"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["cameo.css"]
html_copy_source = False
html_show_copyright = False
smartquotes = False  # `--help` stays as it is typed
html_theme_options = {"top_of_page_buttons": []}

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4  # the anchors of GitHub, so that `page.md#a-heading` works there and here

default_role = "code"  # docstrings write code between single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True  # `device=None` as it is written, not the repr of a value
napoleon_use_ivar = True  # attributes as a list: some are properties, which have entries of their own
napoleon_use_rtype = False
