"""Prompts as LightningDataModules."""

from dblightning.data.base import PromptDataModule
from dblightning.data.drawbench import DrawBenchDataModule
from dblightning.data.geneval import GenEvalDataModule
from dblightning.data.miniature import MiniatureDataModule
from dblightning.data.prompt_file import PromptFileDataModule

__all__ = [
    "DrawBenchDataModule",
    "GenEvalDataModule",
    "MiniatureDataModule",
    "PromptDataModule",
    "PromptFileDataModule",
]
