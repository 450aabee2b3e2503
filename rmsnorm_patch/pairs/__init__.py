"""Reads the forwards of layers and of what runs them, and compiles them anew."""
