"""Whether kernels are launched dependently: so that their blocks may start before the kernel in front has ended.

What a kernel reads, the weight too, it reads behind its dependency wait, so that a dependent launch computes what a
plain one does. The switch is for those who measure, or who look for a race elsewhere. It is read when an op is bound.
"""

from __future__ import annotations

import os

from ..errors import UnsupportedInput

VARIABLE = "RMSNORM_PATCH_PDL"
CHOICES = ("auto", "off")


def read() -> str:
    """What RMSNORM_PATCH_PDL asks for: "auto" (where the device knows dependent launches) or "off"."""
    wanted = os.environ.get(VARIABLE, "").strip().lower() or "auto"
    if wanted not in CHOICES:
        allowed = ", ".join(map(repr, CHOICES))
        raise UnsupportedInput(VARIABLE, repr(wanted), f"{allowed} or unset", "set it to one of these, or unset it")
    return wanted


def describe() -> str:
    """How ops bound now are launched, or what is wrong with the variable."""
    try:
        wanted = read()
    except UnsupportedInput as error:
        return str(error)
    return "plain" if wanted == "off" else "dependent on NVIDIA sm_90 and newer"


def dependent(enable_pdl: bool | None = None) -> bool:
    """Whether an op bound now launches dependently. False launches plainly; None and True leave it to the variable."""
    return read() != "off" and enable_pdl is not False


def decided(dependent: bool | None) -> bool:
    """How kernels are launched for an op for which `dependent` was decided when it was bound: the variable is not read
    again. None: there is none, and kernels bound now do as the variable says."""
    return read() != "off" if dependent is None else dependent
