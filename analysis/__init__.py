"""Compare a model before and after training, and turn the results into figures and one report."""
