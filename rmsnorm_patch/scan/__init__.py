"""Look at a model without touching it: which modules are RMSNorms, and what each computes.

`norms` finds the modules, `subject` builds throwaway twins, `probe` compares them with the specs, `diagnose` explains
the misses; `pairs` and `trace` find the residual-adds beside the norms.
"""

from .norms import Match, infer_spec, scan_norms, variant_name

__all__ = ["Match", "infer_spec", "scan_norms", "variant_name"]
