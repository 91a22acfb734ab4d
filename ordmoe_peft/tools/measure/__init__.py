"""What a model and its tiers are worth, measured on data."""
