"""Look at a model without touching it: which modules are RMSNorms, and what each computes.

`norms` finds the modules, `subject` builds throwaway twins, `probe` compares them with the specs, `diagnose` explains
the misses, `plan` says what is to happen. Imports nothing: a plan's classes are wanted before torch is.
"""
