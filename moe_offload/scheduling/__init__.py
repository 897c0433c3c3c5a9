"""What runs where, decided per layer and token batch: costs, plans, policies. No tensor, no model."""
