"""Seeds of random numbers; imports nothing: options are checked before torch is there."""

# below this: what is drawn from goes from one epoch to the next in steps that must not overflow
SEEDS = 2**32
