"""The norm whose rows are written quantised, for the product that reads them."""
