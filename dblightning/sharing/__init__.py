"""Sharing what was made: one LoRA of a soup for other programs, and a folder with a model card for the hub."""

from dblightning.sharing.export import export_soup
from dblightning.sharing.push import Push, prepare, push

__all__ = ["Push", "export_soup", "prepare", "push"]
