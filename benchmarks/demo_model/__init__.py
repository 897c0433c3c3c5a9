"""How the demo model was made and what it is worth: see README.md."""
