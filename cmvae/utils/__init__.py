"""What knows nothing of the project: files, errors, seeds, progress, how processes end."""
