"""One program per group of budgets: each prints the figure, its bare limit measured in the same run, and the ratio."""
