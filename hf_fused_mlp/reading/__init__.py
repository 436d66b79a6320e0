"""Finds out what a module computes by reading the forward of its class."""
