"""Every error that this package raises on purpose.

Each message names the site (a module path, a file, a variable), what came, what is supported, and the next step.
"""

from __future__ import annotations


class RMSNormPatchError(Exception):
    """Base of all errors of this package."""

    def __init__(self, site: str, got: str, supported: str, next_step: str) -> None:
        self.site = site
        self.got = got
        self.supported = supported
        self.next_step = next_step
        super().__init__(f"{site}: got {got}; supported: {supported}; next: {next_step}")

    def __reduce__(self) -> tuple[type, tuple[str, str, str, str]]:
        return type(self), (self.site, self.got, self.supported, self.next_step)


class UnsupportedInput(RMSNormPatchError, ValueError):
    """An argument, a tensor or a variable is one that nothing here serves."""


class UnsupportedModel(RMSNormPatchError, TypeError):
    """The object given is not a model that can be patched, or holds nothing to patch."""


class PatchConflict(RMSNormPatchError, RuntimeError):
    """Somebody else's patch, or an earlier one of ours with other settings, stands in the way."""


class KernelBuildError(RMSNormPatchError, RuntimeError):
    """A kernel could not be compiled, loaded or launched on this device."""


class UnsafeCacheError(RMSNormPatchError, PermissionError):
    """The on-disk kernel cache is not private to this user, or an artefact in it is not what was written."""


class NoCacheError(RMSNormPatchError, FileNotFoundError):
    """This user has no folder for the on-disk kernel cache."""


class VerificationFailed(RMSNormPatchError, AssertionError):
    """The patched model did not stay within tolerance; `proof` holds the whole report."""

    def __init__(self, site: str, got: str, supported: str, next_step: str, proof: object = None) -> None:
        super().__init__(site, got, supported, next_step)
        self.proof = proof


class NothingProved(VerificationFailed):
    """No fault was found, and nothing that would have shown one: no finite logits, no position, no norm that ran."""
