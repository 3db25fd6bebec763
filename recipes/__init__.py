"""The shipped demo model and what is done with it."""
