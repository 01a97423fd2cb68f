"""A frozen denoiser with adapters: the interface, diffusers pipelines behind it, and one file per family of models."""

from dblightning.backbone.base import Backbone, Conditioning, Prediction, Size
from dblightning.backbone.diffusers import DiffusersBackbone, lock_of
from dblightning.backbone.family import FAMILIES, Family, Guidance, Text, denormalized, family_of, register
from dblightning.backbone.loading import load_pipeline
from dblightning.backbone.stable_diffusion import StableDiffusion, StableDiffusionXL
from dblightning.backbone.transformer import FlowTransformer, Flux, StableDiffusion3

__all__ = [
    "FAMILIES",
    "Backbone",
    "Conditioning",
    "DiffusersBackbone",
    "Family",
    "FlowTransformer",
    "Flux",
    "Guidance",
    "Prediction",
    "Size",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "Text",
    "denormalized",
    "family_of",
    "load_pipeline",
    "lock_of",
    "register",
]
