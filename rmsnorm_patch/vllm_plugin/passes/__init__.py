"""Changes of vLLM's graphs after all of its own passes; each joins one of our ops with its neighbours."""
