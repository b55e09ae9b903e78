"""Judge a cell and its search: signs of collapse, cost, random search, selection among seeds."""
