"""Callbacks, one per file."""

from dblightning.callbacks.before_after import BeforeAfterGrid
from dblightning.callbacks.blend_sampling import BlendSamplingCallback
from dblightning.callbacks.export_adapter import ExportAdapter
from dblightning.callbacks.sample_grid import SampleGrid

__all__ = ["BeforeAfterGrid", "BlendSamplingCallback", "ExportAdapter", "SampleGrid"]
