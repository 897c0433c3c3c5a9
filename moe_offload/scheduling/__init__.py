"""What runs where, decided per layer and token batch: costs, plans, policies. Integers and arrays, no tensor, no model."""
