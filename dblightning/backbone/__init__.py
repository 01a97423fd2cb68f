"""A frozen denoiser with adapters: the interface, and diffusers pipelines behind it."""

from dblightning.backbone.diffusers import (
    COMPONENTS,
    Backbone,
    Conditioning,
    DiffusersBackbone,
    denormalized,
    load_pipeline,
    lock_of,
)

__all__ = [
    "COMPONENTS",
    "Backbone",
    "Conditioning",
    "DiffusersBackbone",
    "denormalized",
    "load_pipeline",
    "lock_of",
]
