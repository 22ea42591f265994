"""Many pictures from a file of prompts, on one machine or with Ray; resumed after a kill."""
