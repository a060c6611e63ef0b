"""What tools/fuzz.py is made of: models to break, ways to break them, and what must hold of each."""
