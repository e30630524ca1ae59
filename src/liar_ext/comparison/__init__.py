"""`liar compare`: a grid of recipes on one checkpoint, with as few passes as possible."""
