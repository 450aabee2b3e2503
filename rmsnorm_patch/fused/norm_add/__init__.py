"""A norm and the residual-add behind it, with the norm that reads the sum where there is one (sandwich layouts)."""
