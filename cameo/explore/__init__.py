"""A page on which one clicks a token and sees where the attention of a model looks."""
