"""Data for the recipes that show the order of stages; see ``generate``."""
