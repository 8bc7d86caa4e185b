"""Figures: grids of samples, plots of results, previews of what a model generates."""
