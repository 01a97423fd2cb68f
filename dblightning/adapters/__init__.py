"""LoRA adapters of one frozen denoiser: the gated layer, the bank that holds them, their files."""

from dblightning.adapters.bank import ATTENTION, AdapterBank
from dblightning.adapters.files import METADATA_KEY, WEIGHTS_NAME, base_name, fingerprint, read_metadata
from dblightning.adapters.gated import GatedLinear, GateState

__all__ = [
    "ATTENTION",
    "METADATA_KEY",
    "WEIGHTS_NAME",
    "AdapterBank",
    "GateState",
    "GatedLinear",
    "base_name",
    "fingerprint",
    "read_metadata",
]
