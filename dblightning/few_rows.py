"""DB-MPA for fewer rows: at most steps one row is computed, and the others' differences to it are an earlier step's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dblightning.draws import rotation
from dblightning.settings import Number, check_settings

#: of the setting below
RULES = {"full_share": Number(least=0, most=1, remedy="1 computes every row at every step")}


def check(full_share: float) -> None:
    """Raises ValueError for a share outside [0, 1]."""
    check_settings({"full_share": full_share}, RULES)


def full_steps(num_steps: int, full_share: float) -> Tensor:
    """The steps at which every row is computed, bool (T,): the first share of them, at least one.

    >>> full_steps(10, 0.2).int().tolist()
    [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    """
    return torch.arange(num_steps) < max(1, int(full_share * num_steps + 0.5))


def in_turn(mixes: Tensor, names: Sequence[str], full: Tensor) -> Tensor:
    """Of each step's mix the part whose rows are computed: all of it at full steps, else one row of coefficient 1.

    With ε_j of row j now and ε_j' its output at the last full step, a step's prediction is then

        Σ_j now_j ε_j + Σ_j (mix_j − now_j) ε_j'  =  ε_i + Σ_j mix_j (ε_j' − ε_i'),    i the row whose turn it is

    which errs by what the differences ε_j − ε_i have changed since. Rows take turns with shares of the steps
    proportional to their positive coefficients, so that to first order in that change, (ε_j − ε_j') − (ε_i − ε_i')
    weighted by mix_j, the errors of the turns cancel wherever no coefficient is negative.

    Args:
        mixes: coefficients of every step, (T, K, B), each step's summing to 1 over K.
        names: of the K rows, for their order in turn, which so does not depend on the order of the rows.
        full: the full steps, bool (T,), the first step among them.

    Returns:
        (T, K, B), summing to 1 over K.
    """
    cheap = (~full).nonzero().flatten()
    order = torch.tensor(sorted(range(len(names)), key=lambda row: names[row]))
    now = mixes.clone()
    now[cheap] = 0
    shares = mixes.clamp_min(0)
    shares = shares / shares.sum(1, keepdim=True)
    offsets = torch.full((len(names) - 1,), 0.5, dtype=torch.float64)
    for image in range(mixes.shape[2]):
        now[cheap, order[rotation(shares[cheap][:, order, image], offsets)], image] = 1
    return now
