"""Measurements; every one of a peer and of spimpi in the same run, as a ratio."""
