"""Shared code of the book: one module, one subject; imports point downwards (see CONTRIBUTING.md)."""

__version__ = "0.1.0"
