"""A file of prompts, answered: its lines, their answers in order, what is kept meanwhile, and how processes share them."""
