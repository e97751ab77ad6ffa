"""Recipes as YAML, one file each."""
