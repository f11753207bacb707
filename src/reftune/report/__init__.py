"""Reports: figures, tables, plots, published results, and the grids that make them."""
