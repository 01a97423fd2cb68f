"""dblightning: RL fine-tuning of diffusion models for several rewards, blended at inference (Diffusion Blend)."""

__version__ = "0.1.0"
