"""From a problem to a plan: what is tried, what may be compiled, what is measured and remembered."""
