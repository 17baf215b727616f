"""Recipes: `get_config(arguments)` in each file returns a resolved ml_collections config."""
