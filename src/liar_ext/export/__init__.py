"""Folders for other engines: what a checkpoint is written as so that a server loads it."""
