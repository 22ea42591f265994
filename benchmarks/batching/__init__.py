"""Requests that share a recorded step, held to float64 and timed."""
