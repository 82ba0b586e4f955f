"""Faults at random moments of the whole pipeline, and what has to hold after each of them."""
