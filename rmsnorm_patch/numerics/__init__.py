"""What is computed, on what, and how far two results may be apart."""
