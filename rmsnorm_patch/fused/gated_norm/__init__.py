"""The norm with a gate, in one kernel: of a product with an activation, or times one."""
