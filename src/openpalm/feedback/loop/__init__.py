"""The loop page: training, models, comparisons, promotion, the board."""
