"""silu_and_mul whose rows are written quantised, for the product that reads them."""
