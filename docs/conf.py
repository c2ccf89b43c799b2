"""Sphinx's configuration: pages in Markdown, notebooks as they were executed, reference and API from the code."""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "scripts"), str(DOCS)]

import generate  # noqa: E402

import recnb  # noqa: E402

project = "recnb"
author = "the recnb authors"
copyright = "the recnb authors, Apache-2.0"
release = recnb.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "_generated"]
highlight_language = "none"  # a block without a language is a command or plain text
nb_execution_mode = "off"  # docs/build.py has executed them
nb_ipywidgets_js = {}  # no scripts from the network
myst_enable_extensions = ["deflist", "colon_fence"]
myst_heading_anchors = 3
myst_links_external_new_tab = True

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 80

html_theme = "pydata_sphinx_theme"
html_title = "recnb"
html_static_path = ["_static"]
html_css_files = ["recnb.css"]
html_show_sourcelink = False
html_copy_source = False
html_sidebars = {"index": [], "glossary": []}
html_theme_options = {
    "logo": {"text": "recnb"},
    "navbar_end": ["theme-switcher"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "header_links_before_dropdown": 6,
    "show_toc_level": 2,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


def setup(app):
    """Make the generated pages before Sphinx looks for pages, and read docstrings as Markdown-like text."""
    app.connect("builder-inited", lambda app: generate.write_pages(DOCS))
    app.connect("autodoc-process-docstring", generate.as_rst, priority=400)  # before napoleon
