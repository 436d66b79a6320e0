"""Connects the package to other libraries. Only these modules import them."""
