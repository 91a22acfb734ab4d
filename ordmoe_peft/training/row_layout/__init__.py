"""How the rows of several tiers are laid out in one forward: each on its own, or on a shared prompt."""
