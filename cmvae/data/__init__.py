"""Read packed data sets: index, plan, downloads, reader."""
