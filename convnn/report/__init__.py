"""From many runs to tables, plots and one page."""
