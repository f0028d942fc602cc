"""Win rates, intervals and figures, from tables alone."""
