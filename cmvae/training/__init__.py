"""One loop for any task, and what it needs."""
