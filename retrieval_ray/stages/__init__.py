"""The stages: the only package code that imports ray. They talk through tables on disk."""
