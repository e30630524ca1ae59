"""The driver and what it stands on: capture, stores, progress; `api` is the way in."""
