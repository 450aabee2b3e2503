"""A product and the fused norm behind it, whose kernel adds up the parts of a split product."""
