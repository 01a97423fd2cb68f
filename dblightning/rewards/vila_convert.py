"""VILA's published SavedModel → weights for the torch port: ``python -m dblightning convert-vila``.

Not yet run on the released file: the names inside it are unknown to us. So nothing is guessed. Variables are matched by
the end of their names; what is missing or ambiguous stops the conversion with a list; and nothing is written unless
both backends give the same scores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dblightning.arguments import VILA_TOLERANCE, convert_vila_parser
from dblightning.rewards.vila import VILA, SavedModel
from dblightning.rewards.vila_model import VilaModel, from_praxis, praxis_names, save_vila

#: largest difference of a score v, before scaling, at which the port counts as the same model
TOLERANCE = VILA_TOLERANCE


def convert_vila(
    source: str | Path, out: str | Path, names: Mapping[str, str] | None = None, tolerance: float = TOLERANCE
) -> float:
    """Convert a SavedModel's variables and write them, if both backends then agree.

    Args:
        source: folder of the SavedModel.
        out: the ``.safetensors`` file to write.
        names: praxis name → variable name, for variables whose names do not say what they are.
        tolerance: largest |v_torch − v_tensorflow| accepted on the test pictures.

    Returns:
        The largest difference found.

    Raises:
        ImportError: TensorFlow is not installed. FileNotFoundError: no SavedModel there.
        ValueError: a variable cannot be identified, or the two backends disagree; nothing is written.
    """
    reference = SavedModel(source)
    variables = read_variables(Path(reference.path))
    matched = match_names({name: array.shape for name, array in variables.items()}, names or {})
    model = from_praxis({praxis: variables[name] for praxis, name in matched.items()})
    pictures = probe_pictures(model.image_size)
    difference = check_agreement(model, pictures, [reference.score(picture) for picture in pictures], tolerance)
    note = {"source": Path(reference.path).name, "largest_difference": f"{difference:.2e}"}
    save_vila(model, Path(out), note)
    return difference


def read_variables(folder: Path) -> dict[str, np.ndarray]:
    """Every numeric variable of a SavedModel by name."""
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(folder / "variables" / "variables"))
    floats = [name for name, dtype in reader.get_variable_to_dtype_map().items() if dtype.is_floating]
    return {name: np.asarray(reader.get_tensor(name)) for name in floats}


def match_names(shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, str]) -> dict[str, str]:
    """praxis name → variable name, by the end of the variable's name.

    Args:
        shapes: variable name → shape, as TensorFlow lists them.
        given: pairs that are known.

    Raises:
        ValueError: a name that fits no variable, or several; the text lists all of both.
    """
    plain = {name: _plain(name) for name in shapes}
    wanted = praxis_names({}, *(_count_layers(plain.values(), stack) for stack in ("transformers_stack", "unimodal")))
    matched, missing, ambiguous = dict(given), [], []
    for praxis in wanted:
        if praxis in matched:
            if matched[praxis] not in shapes:
                missing.append(f"{praxis} (given as {matched[praxis]})")
            continue
        found = [name for name, text in plain.items() if text == praxis or text.endswith(f".{praxis}")]
        if len(found) == 1:
            matched[praxis] = found[0]
        elif found:
            ambiguous.append(f"{praxis}: {', '.join(found)}")
        else:
            missing.append(praxis)
    if missing or ambiguous:
        listing = "\n".join(f"  {name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(
            "cannot tell which variable is which. Write the pairs {parameter: variable} into a JSON file and pass "
            f"--names FILE.\nNo variable for: {', '.join(missing) or 'none'}\n"
            f"Several variables for: {'; '.join(ambiguous) or 'none'}\nThe SavedModel's variables:\n{listing}"
        )
    return {praxis: matched[praxis] for praxis in wanted}


def check_agreement(
    model: VilaModel, pictures: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = TOLERANCE
) -> float:
    """Largest |v − expected| of the port, with its own preprocessing, over pictures (1, 3, H, W).

    Raises:
        ValueError: it exceeds ``tolerance``, or all expected scores are the same, so that they show nothing.
    """
    port = VILA(model, scale=1.0, shift=0.0)
    scores = torch.cat([port.score(picture, [""] * len(picture)) for picture in pictures])
    reference = torch.cat(list(expected)).float()
    difference = (scores - reference).abs().max().item()
    if not difference <= tolerance:  # also a NaN
        pairs = ", ".join(f"{ours:.4f}/{theirs:.4f}" for ours, theirs in zip(scores, reference, strict=True))
        raise ValueError(
            f"the torch port and the SavedModel differ by {difference:.2g}, more than {tolerance:g} (torch/tensorflow: "
            f"{pairs}); nothing was written. Use VILA(backend='tensorflow') and report this"
        )
    if reference.max() - reference.min() <= 2 * tolerance:
        raise ValueError("the SavedModel scores all test pictures alike, which proves nothing; nothing was written")
    return difference


def probe_pictures(size: int) -> list[Tensor]:
    """Pictures of several sizes and textures, each (1, 3, H, W) in [0, 1], the same every time."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(size, size), (2 * size, 2 * size), (size + 31, 2 * size + 5), (2 * size, size // 2), (37, 53)]
    pictures = []
    for index, shape in enumerate(shapes):
        coarse = torch.rand(1, 3, 4 + 3 * index, 4 + 3 * index, generator=generator)
        picture = functional.interpolate(coarse, shape, mode="bilinear")
        noise = torch.rand(1, 3, *shape, generator=generator)
        pictures.append((picture + 0.1 * index * (noise - 0.5)).clamp(0, 1))
    flat = torch.tensor([0.9, 0.2, 0.1]).view(1, 3, 1, 1).expand(1, 3, size, size).contiguous()
    return [*pictures, flat]


def convert_vila_main(argv: Sequence[str] | None = None) -> None:
    """The command ``convert-vila``; exits with status 1 and one sentence when it refuses."""
    arguments = convert_vila_parser().parse_args(argv)
    names = json.loads(arguments.names.read_text(encoding="utf-8")) if arguments.names else None
    try:
        difference = convert_vila(arguments.saved_model, arguments.out, names, arguments.tolerance)
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{arguments.out}: written; largest difference between the backends {difference:.1e}")


def _plain(name: str) -> str:
    """A checkpoint's variable name with dots: "p/a.Sb/.ATTRIBUTES/VARIABLE_VALUE" → "p.a.b"."""
    # TensorFlow writes a "/" inside an attribute's name as ".S" and a "." as ".."
    text = name.removesuffix("/.ATTRIBUTES/VARIABLE_VALUE")
    return re.sub(r"\.S|\.\.|/", ".", text)


def _count_layers(names: Iterable[str], stack: str) -> int:
    found = [re.search(rf"{stack}[^.]*\.x_layers_(\d+)\.", name) for name in names]
    return max((int(match.group(1)) + 1 for match in found if match), default=0)
