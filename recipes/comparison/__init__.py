"""A comparison of arms, sizes and controls: which runs there are, what each does, and what is reported of them."""
