"""The demo model and its texts, as package data."""

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"
CALIBRATION = FOLDER / "calibration.txt"
HELDOUT = FOLDER / "heldout.txt"
