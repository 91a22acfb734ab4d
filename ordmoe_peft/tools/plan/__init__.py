"""What training a model will take of a card's memory, from its configuration alone."""
