"""What the models of other libraries share on packed tokens: the check of their parts, their blocks, the comparison with the original."""
