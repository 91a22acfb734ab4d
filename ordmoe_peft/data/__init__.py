"""Samples, their images and responses, generation by tier, rollouts and preference pairs."""
