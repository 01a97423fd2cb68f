"""LoRA adapters of one frozen denoiser: the gated layer, the bank that holds them, their files."""

from dblightning.adapters.bank import ATTENTION, AdapterBank
from dblightning.adapters.files import (
    FORMS,
    METADATA_KEY,
    WEIGHTS_NAME,
    Form,
    annotate,
    file_digest,
    find_file,
    read_metadata,
)
from dblightning.adapters.fit import base_name, fingerprint
from dblightning.adapters.gated import GatedConv2d, GatedLayer, GatedLinear, GateState
from dblightning.adapters.gating import Gating, Segment
from dblightning.adapters.soup import Soup, soup_lora
from dblightning.adapters.text_encoders import silence_text_adapters

__all__ = [
    "ATTENTION",
    "FORMS",
    "METADATA_KEY",
    "WEIGHTS_NAME",
    "AdapterBank",
    "Form",
    "GateState",
    "GatedConv2d",
    "GatedLayer",
    "GatedLinear",
    "Gating",
    "Segment",
    "Soup",
    "annotate",
    "base_name",
    "file_digest",
    "find_file",
    "fingerprint",
    "read_metadata",
    "silence_text_adapters",
    "soup_lora",
]
