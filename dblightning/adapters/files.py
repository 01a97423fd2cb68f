"""LoRA files: reading every common form (:mod:`keys` lists them), writing three of them, and their metadata."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dblightning.adapters.flux_keys import diffusers_flux_tensors, is_original_flux
from dblightning.adapters.keys import check_lora, denoiser_of, parse
from dblightning.adapters.kohya import kohya_name
from dblightning.adapters.lora import LoraFactors, LoraFile, lora_config, peft_tensors, two_text_encoders
from dblightning.whole_files import replacing

Form = Literal["diffusers", "kohya", "peft"]
FORMS: tuple[Form, ...] = ("diffusers", "kohya", "peft")
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_CONFIG_NAME = "adapter_config.json"
METADATA_KEY = "dblightning"
#: diffusers' name of a LoRA config in a file's header
CONFIG_KEY = "lora_adapter_metadata"
#: PEFT settings that make of an adapter something else than LoRA or DoRA
OTHER_VARIANTS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "modules_to_save",
    "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip


def find_file(path: str | Path) -> Path:
    """The safetensors file that ``path`` means: itself, or the LoRA in a folder.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a folder of several files without one of the usual names.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            # a folder's usual name first: that is what a mistyped folder is after
            raise FileNotFoundError(f"{path} does not exist; give an exported folder or a safetensors file")
        return path
    for name in (WEIGHTS_NAME, PEFT_WEIGHTS_NAME):
        if (path / name).is_file():
            return path / name
    files = sorted(path.glob("*.safetensors"))
    if len(files) > 1:
        raise ValueError(f"{path} holds {len(files)} safetensors files; name one, such as {files[0].name}")
    if not files:
        raise FileNotFoundError(f"{path / WEIGHTS_NAME} does not exist; give an exported folder or a safetensors file")
    return files[0]


def read_lora(path: str | Path, layers_per_block: int = 2, denoiser: str | None = None) -> LoraFile:
    """Read a LoRA of any form; see docs/adapters.md.

    Args:
        path: file or folder.
        layers_per_block: of the denoiser, for keys that count its blocks as the original code does (SDXL by kohya).
        denoiser: what the denoiser's keys in diffusers' form start with; None goes by the keys.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not a safetensors file, or something else than LoRA in it.
    """
    from safetensors.torch import load_file

    file = find_file(path)
    header = _header(file)
    tensors = load_file(file)
    if is_original_flux(tensors):
        check_lora(tensors, file)
        tensors = diffusers_flux_tensors(tensors, file)
    denoiser = denoiser or denoiser_of(tensors)
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        component, module, part = parse(key, file, layers_per_block, denoiser)
        if part in parts.setdefault((component, module), {}):
            raise ValueError(f"{file} holds {part} of {component}.{module} twice, the second time as {key!r}")
        parts[component, module][part] = tensor
    config, native = _config(file, header, any(key.startswith("base_model.model.") for key in tensors), denoiser)
    modules: dict[str, dict[str, LoraFactors]] = {}
    for (component, module), found in parts.items():
        modules.setdefault(component, {})[module] = _factors(file, component, module, found, config)
    facts = json.loads(header.pop(METADATA_KEY, "{}"))
    header.pop(CONFIG_KEY, None)
    header.pop("format", None)
    named = any(
        key.startswith((f"{denoiser}.", "lora_unet_", "lora_transformer_", "lycoris_", "base_model.model."))
        for key in tensors
    )
    return LoraFile(modules, facts, header, file, native, not named, denoiser)


def _header(file: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file ({error}); export the adapter again") from error


def _config(
    file: Path, header: Mapping[str, str], native: bool, denoiser: str
) -> tuple[dict[str, dict[str, Any]], str]:
    """PEFT's configs by component, and why the scale is a guess."""
    beside = file.parent / PEFT_CONFIG_NAME
    if native and not beside.is_file() and CONFIG_KEY not in header:
        return {}, f"{beside} is missing, which says lora_alpha: alpha is taken to be the rank, scale 1"
    if native and beside.is_file():
        flat = json.loads(beside.read_text(encoding="utf-8"))
        configs = {denoiser: flat}
    else:
        packed = json.loads(header.get(CONFIG_KEY, "{}"))
        configs = {}
        for key, value in packed.items():
            component, dot, rest = key.partition(".")
            configs.setdefault(component if dot else denoiser, {})[rest if dot else key] = value
    for config in configs.values():
        kind = config.get("peft_type") or "LORA"
        if str(kind).rpartition(".")[2] != "LORA":
            raise ValueError(
                f"{file} is a PEFT adapter of type {kind}; only LORA (with DoRA and lora_bias) can be loaded"
            )
        other = [name for name in OTHER_VARIANTS if config.get(name)]
        if other:
            raise ValueError(f"{file} was made with PEFT's {other[0]}, which is not plain LoRA or DoRA and has no gate")
    return configs, ""


def _factors(
    file: Path, component: str, module: str, found: dict[str, Tensor], configs: dict[str, dict[str, Any]]
) -> LoraFactors:
    missing = [part for part in ("down", "up") if part not in found]
    if missing:
        raise ValueError(f"{file} holds {sorted(found)} of {component}.{module} but not its {missing[0]} matrix")
    down, up = found["down"], found["up"]
    rank = len(down)
    if up.ndim < 2 or up.shape[1] != rank:
        raise ValueError(f"{file}: {component}.{module} multiplies {tuple(up.shape)} by {tuple(down.shape)}")
    alpha = float(found["alpha"]) if "alpha" in found else _alpha(configs.get(component), module, rank)
    magnitude = found.get("magnitude", found.get("dora_scale"))
    outputs = magnitude is None or (magnitude if "magnitude" in found else magnitude[:, :1]).numel() == len(up)
    if magnitude is not None and (magnitude.numel() != len(up) or not outputs):
        raise ValueError(
            f"{file}: the DoRA magnitude of {component}.{module} is {tuple(magnitude.shape)} for {len(up)} outputs; "
            "only DoRA with one magnitude per output (PEFT; LyCORIS' wd_on_output) can be loaded"
        )
    magnitude = None if magnitude is None else magnitude.flatten()
    return LoraFactors(down, up, alpha, found.get("bias"), magnitude)


def _alpha(config: Mapping[str, Any] | None, module: str, rank: int) -> float:
    """Scale times rank, as PEFT finds it for a module; the rank, scale 1, where nothing is said."""
    if not config:
        return float(rank)
    patterns = config.get("alpha_pattern") or {}
    alpha = config.get("lora_alpha", rank)
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha) * (rank**0.5 if config.get("use_rslora") else 1.0)


def write_lora(
    path: str | Path, lora: LoraFile, form: Form = "diffusers", configs: Mapping[str, Mapping[str, Any]] | None = None
) -> Path:
    """Write a LoRA. The file appears complete or not at all.

    Args:
        path: the file; for the peft form its folder also gets ``adapter_config.json``.
        lora: what to write.
        form: "diffusers", "kohya" or "peft".
        configs: component → PEFT config to record (diffusers and peft); None derives it.

    Returns:
        ``path``.

    Raises:
        ValueError: something the form has no place for.
    """
    path = Path(path)
    if form not in FORMS:
        raise ValueError(f"format must be one of {FORMS}, got {form!r}")
    header = {"format": "pt", **lora.header}
    if lora.facts:
        header[METADATA_KEY] = json.dumps(lora.facts, default=str)
    configs = configs or {component: lora_config(found) for component, found in lora.modules.items()}
    if form == "kohya":
        tensors = _kohya_tensors(lora)
        header |= _kohya_header(lora)
    else:
        tensors = {}
        for component, found in lora.modules.items():
            if form == "peft" and component != lora.denoiser:
                continue
            prefix = f"{component}." if form == "diffusers" else "base_model.model."
            for module, each in found.items():
                tensors |= {prefix + key: tensor for key, tensor in peft_tensors(module, each).items()}
        if form == "diffusers":
            packed = {f"{component}.{key}": _jsonable(value) for component, config in configs.items()
                      for key, value in config.items()}  # fmt: skip
            header[CONFIG_KEY] = json.dumps(packed, indent=2, sort_keys=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "peft":
        config = {"peft_type": "LORA", **{key: _jsonable(value) for key, value in configs[lora.denoiser].items()}}
        _replace(path.parent / PEFT_CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True).encode())
    write_tensors(path, tensors, header)
    return path


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write a safetensors file, completely or not at all, with the permissions of any new file (umask)."""
    from safetensors.torch import save

    _replace(path, save({key: tensor.contiguous() for key, tensor in tensors.items()}, dict(header)))


def _replace(path: Path, content: bytes) -> None:
    with replacing(path) as aside:
        aside.write_bytes(content)


def _kohya_tensors(lora: LoraFile) -> dict[str, Tensor]:
    biased = [module for found in lora.modules.values() for module, each in found.items() if each.bias is not None]
    if biased:
        raise ValueError(f"kohya's form has no place for lora_bias ({biased[0]}); write the diffusers or peft form")
    first = "lora_te1" if two_text_encoders(lora) else "lora_te"
    tensors = {}
    for component, found in lora.modules.items():
        own = "lora_transformer" if lora.denoiser == "transformer" else "lora_unet"
        prefix = {lora.denoiser: own, "text_encoder": first}.get(component, "lora_te2")
        for module, each in found.items():
            name = f"{prefix}_{kohya_name(module)}"
            tensors[f"{name}.lora_down.weight"] = each.down
            tensors[f"{name}.lora_up.weight"] = each.up
            tensors[f"{name}.alpha"] = torch.tensor(each.alpha, dtype=torch.float64).to(_alpha_dtype(each.alpha))
            if each.magnitude is not None:
                tensors[f"{name}.dora_scale"] = each.magnitude.view(-1, *[1] * (each.down.ndim - 1))
    return tensors


def _alpha_dtype(alpha: float) -> torch.dtype:
    """float32, which every reader knows, unless it would change the value."""
    exact = torch.tensor(alpha, dtype=torch.float32).item() == alpha
    return torch.float32 if exact else torch.float64


def _kohya_header(lora: LoraFile) -> dict[str, str]:
    config = lora_config(lora.modules[lora.denoiser]) if lora.denoiser in lora.modules else {}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.get("r", "")),
        "ss_network_alpha": str(config.get("lora_alpha", "")),
    } | {key: value for key, value in lora.header.items() if key.startswith("ss_")}


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The facts :meth:`AdapterBank.export` put into an adapter's file (or folder); {} for a foreign file."""
    path = Path(path)
    return json.loads(_header(find_file(path)).get(METADATA_KEY, "{}"))


def annotate(path: str | Path, **facts: Any) -> Path:
    """Add facts to the metadata of an adapter's file (or the one in a folder), its tensors as they are; the file.

    Raises:
        FileNotFoundError: nothing there. ValueError: not a safetensors file.
    """
    from safetensors.torch import load_file

    file = find_file(path)
    header = _header(file)
    known = json.loads(header.get(METADATA_KEY, "{}"))
    write_tensors(file, load_file(file), header | {METADATA_KEY: json.dumps(known | facts, default=str)})
    return file


def file_digest(path: str | Path) -> str:
    """SHA-256 of an adapter's file (or the one in a folder): which weights something was made with."""
    return hashlib.sha256(find_file(path).read_bytes()).hexdigest()


def file_in(target: str | Path, form: Form, name: str) -> Path:
    """The file to write: ``target`` where it is a ``.safetensors`` file, else the form's usual name in that folder.

    The kohya form has none, and takes ``name``.
    """
    path = Path(target)
    if path.suffix == ".safetensors":
        return path
    return path / {"diffusers": WEIGHTS_NAME, "peft": PEFT_WEIGHTS_NAME}.get(form, f"{name}.safetensors")


def _jsonable(value: Any) -> Any:
    if isinstance(value, set):
        return sorted(value)
    return value if isinstance(value, str | int | float | bool | list | dict | None) else str(value)
