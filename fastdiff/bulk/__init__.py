"""Many pictures from a file of prompts, on one machine or by Ray; resumed after a kill."""
