"""Checkpoints: reading, writing, one layer at a time, and loading what was written."""
