"""Compares two states of a project: which is slower, by how much, and how certain that is."""
