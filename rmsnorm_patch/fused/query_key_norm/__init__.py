"""The norms of queries and keys in one launch."""
