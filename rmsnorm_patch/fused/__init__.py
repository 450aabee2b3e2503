"""Ops whose host side must decide something, a folder each."""
