"""The command ``python -m dblightning serve``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dblightning.arguments import TOKEN_VARIABLE, named_paths, serve_parser
from dblightning.miniature import adapter_folder
from dblightning.preset import Preset, adapter_names, even_preset

if TYPE_CHECKING:
    from dblightning.serving.settings import ServiceSettings

#: shortest token accepted; ``python -c "import secrets; print(secrets.token_urlsafe(32))"`` makes one of 43
MIN_TOKEN_LENGTH = 16


def serve_main(argv: Sequence[str] | None = None) -> None:
    """Run the service until it is told to stop."""
    options = serve_parser().parse_args(argv)
    settings = service_settings(options)
    from dblightning.serving.service import serve

    serve(settings, options.host, options.port, options.log_level)


def service_settings(options: argparse.Namespace) -> ServiceSettings:
    """Settings of a command line; everything that can be wrong is looked at before a model is loaded.

    Raises:
        FileNotFoundError, ValueError: in one sentence.
    """
    base, adapters, presets = model_of(options)
    token = _token(options)
    if not 1024 <= options.port <= 65535:
        raise ValueError(f"--port must be from 1024 to 65535, got {options.port}")
    if options.timeout <= 0 or not 0 <= options.batch_wait < options.timeout:
        raise ValueError("--timeout must be above 0, --batch-wait at least 0 and below the timeout")
    if options.devices != "auto" and not options.devices.isdigit():
        raise ValueError(f"--devices must be a number or auto, got {options.devices!r}")
    if options.max_images > options.queue_limit:
        raise ValueError(f"--max-images {options.max_images} is above --queue-limit {options.queue_limit}")
    from dblightning.serving.requests import Limits, Offer
    from dblightning.serving.settings import ServiceSettings

    given = vars(options)
    own = {
        "offer": Offer(adapter_names(base, adapters), presets, Limits(**_of_fields(Limits, given))),
        "base": base,
        "adapters": adapters,
        "devices": options.devices if options.devices == "auto" else int(options.devices),
        "token": token,
    }
    return ServiceSettings(**_of_fields(ServiceSettings, given) | own)


def _of_fields(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given for a dataclass's fields; a field that no option has keeps its default."""
    return {field.name: given[field.name] for field in fields(kind) if field.name in given}


def model_of(options: argparse.Namespace) -> tuple[str, dict[str, str] | None, dict[str, Preset]]:
    """Base, adapters and presets by name (the file's, without its ending) of a command line, the default first.

    Base and adapters are the options', else those of the first preset.

    Raises:
        FileNotFoundError, ValueError: a preset or adapter that is missing or wrong.
    """
    read = [Preset.read(path) for path in options.presets]
    first = read[0] if read else Preset()
    base = options.base or first.base
    named = named_paths(options.adapters, "--adapter") or {}
    # names on the hub stay as they are
    given = {name: str(adapter_folder(path)) if path.startswith("miniature:") else path for name, path in named.items()}
    adapters = given or (None if first.adapters is None else dict(first.adapters))
    for name, path in (adapters or {}).items():
        looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
        if looks_local and not Path(path).expanduser().exists():
            raise FileNotFoundError(f"adapter {name!r}: no file or folder {path}")
    names = adapter_names(base, adapters)
    presets = dict(zip((path.stem for path in options.presets), read, strict=True))
    for name, preset in presets.items():
        weights = preset.weights or {}
        knots = [weights] if isinstance(weights, dict) else list(weights)
        unknown = [each for knot in knots for each in knot if each not in names]
        if unknown:
            raise ValueError(f"preset {name!r} names adapter {unknown[0]!r}; the adapters are {', '.join(names)}")
    return base, adapters, presets or {"even": even_preset(base, adapters)}


def _token(options: argparse.Namespace) -> str | None:
    """The token of a file or of the environment, not of the command line, which every user of a machine can read."""
    if options.no_token:
        return None
    file: Path | None = options.token_file
    if file is not None and not file.is_file():
        raise FileNotFoundError(f"--token-file: no file {file}")
    token = file.read_text(encoding="utf-8").strip() if file is not None else os.environ.get(options.token_env, "")
    if not token:
        if options.host != "127.0.0.1":
            raise ValueError(
                f"listening on {options.host} needs a token: --token-file FILE, or set {TOKEN_VARIABLE}; --no-token "
                "turns it off"
            )
        return None
    if len(token) < MIN_TOKEN_LENGTH or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(
            f"the token must be at least {MIN_TOKEN_LENGTH} printable ASCII characters without spaces, got "
            f'{len(token)}; make one with python -c "import secrets; print(secrets.token_urlsafe(32))"'
        )
    return token
