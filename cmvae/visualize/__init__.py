"""Figures: grids of samples, plots of results, comparisons of experiments, previews of a model."""
