"""An inference server for language models that look things up instead of computing them."""

__version__ = "0.1.0"
