"""Snapshots, training runs, scores, comparisons, promotion: the work behind the loop page."""
