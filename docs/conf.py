"""Sphinx configuration. Nothing here needs the network."""

import convexrobust

project = "convexrobust"
author = "The convexrobust developers"
copyright = "2026, The convexrobust developers"
release = convexrobust.__version__
version = ".".join(release.split(".")[:2])

extensions = [
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx_gallery.gen_gallery",
]
templates_path = ["_templates"]
exclude_patterns = ["_build"]
default_role = "py:obj"  # single backquotes in docstrings link to what they name

# scikit-learn's inherited docstrings refer to labels of its own user guide.
suppress_warnings = ["ref.ref"]

autosummary_ignore_module_all = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # numpydoc sections state types and shapes already
numpydoc_show_class_members = False  # the class template lists them

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_signature": False,
}

html_theme = "pydata_sphinx_theme"
html_show_sourcelink = False
html_theme_options = {"show_prev_next": False}
